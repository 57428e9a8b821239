"""Renders docs/reference/settings.md from the settings themselves; `make docs` writes it, test_docs compares it."""

import sys
from typing import get_args

from pydantic.fields import FieldInfo

from server.cli.names import flag_of
from server.cluster.settings import ClusterSettings
from server.engine_settings import ENV_PREFIX, Panel, PanelName
from server.settings import ServerSettings

HEADER = """\
# Settings

Generated from the settings' classes in `server/` by `make docs`; do not edit. Every setting of `cllm serve` is a flag
and an environment variable; the flag wins. `cllm serve --help` prints the same. Those under Cluster are of
`cllm deploy` alone, which takes the others too; its `--response-store` is off where it is not given.
"""


def render_settings_page() -> str:
    """The whole page, Markdown."""
    return "\n".join([HEADER, *(_render_panel(panel) for panel in get_args(PanelName))])


def _render_panel(panel: PanelName) -> str:
    all_fields = {**ClusterSettings.model_fields, **ServerSettings.model_fields}
    fields = [(name, field) for name, field in all_fields.items() if Panel(panel) in field.metadata]
    head = [f"## {panel}", "", "| flag | environment | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(_render_row(name, field) for name, field in fields), ""])


def _render_row(name: str, field: FieldInfo) -> str:
    flag = "MODEL (argument)" if name == "model" else f"`{flag_of(name, field)}`"
    default = "" if field.default in (None, ()) else f"`{str(field.default).lower()}`"
    return f"| {flag} | `{ENV_PREFIX}{name.upper()}` | {default} | {field.description} |"


if __name__ == "__main__":
    sys.stdout.write(render_settings_page())
