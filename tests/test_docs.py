"""Documents cannot drift: settings, flags, links and snippets in them are checked against the code."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from server.cli import app
from server.cli.names import flag_of, variables_of
from server.engine_settings import ENV_PREFIX
from server.settings import ServerSettings
from tests.metrics_page import metric_families, render_metrics_page, series_name
from tests.settings_page import render_settings_page

ROOT = Path(__file__).parent.parent
OTHER_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES = sorted([*OTHER_PAGES, *(ROOT / "docs").rglob("*.md")])

# The image sets where it listens and on what device; a worker's endpoint makes no sense inside one container.
SET_BY_IMAGE = {"host", "port", "device", "worker"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MAKE = re.compile(r"(?:^|`)make ([a-z-]+)", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def _snippets(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def _flags() -> dict[str, set[str]]:
    """Flags of each `cllm` command; those of a group's commands under names like "bench engine"."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return _flags_of_group(group, prefix="")


def _flags_of_group(group: TyperGroup, prefix: str) -> dict[str, set[str]]:
    flags: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            flags |= _flags_of_group(command, f"{prefix}{name} ")
        else:
            flags[prefix + name] = _flags_of(command.params) | {"--help"}
    return flags


def _flags_of(params: Iterable[object]) -> set[str]:
    options = [param for param in params if isinstance(param, TyperOption)]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def _documented_commands(page: Path) -> list[list[str]]:
    """Every `cllm ...` line of the page's shell snippets, and the ARGS of every `make serve`, as words."""
    lines = [
        line for body in _snippets(page, "bash", "console", "sh") for line in body.replace("\\\n", " ").splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines if re.search(r"\bcllm \w|make serve", line)]
    made = [
        ["serve", *shlex.split(word.removeprefix("ARGS="))]
        for line in words
        if line[:2] == ["make", "serve"]
        for word in line
        if word.startswith("ARGS=")
    ]
    return made + [line[line.index("cllm") + 1 :] for line in words if "cllm" in line]


def test_the_settings_page_is_the_one_generated_from_the_settings() -> None:
    page = ROOT / "docs" / "reference" / "settings.md"
    assert page.read_text(encoding="utf-8") == render_settings_page(), "run `make docs`"


def test_every_setting_is_a_flag_of_cllm_serve() -> None:
    fields = ServerSettings.model_fields.items()
    assert {flag_of(name, field) for name, field in fields if name != "model"} <= _flags()["serve"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_and_flags_exist(page: Path) -> None:
    flags = _flags()
    for words in _documented_commands(page):
        name = " ".join(words[:2]) if " ".join(words[:2]) in flags else words[0]
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= flags.get(name, set()), f"{page.name}: cllm {name}"
        assert name in flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_compile(page: Path) -> None:
    for body in _snippets(page, "python"):
        assert compile(body, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_compose_passes_on_every_setting_that_the_image_leaves_open() -> None:
    passed = re.findall(rf"^    ({ENV_PREFIX}\w+):$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    open_settings = ServerSettings.model_fields.keys() - SET_BY_IMAGE
    assert set(passed) == {variable for name in open_settings for variable in variables_of(name)}


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {name for page in PAGES for name in _MAKE.findall(page.read_text(encoding="utf-8"))}
    assert used
    assert used <= targets


def test_the_metrics_page_is_the_one_generated_from_the_metrics() -> None:
    page = ROOT / "docs" / "reference" / "metrics.md"
    assert page.read_text(encoding="utf-8") == render_metrics_page(), "run `make docs`"


def test_documented_metrics_exist() -> None:
    defined = {series_name(family) for family in metric_families()}
    suffix = re.compile(r"_(bucket|sum|count)$")
    for page in PAGES:
        named = re.findall(r"\b(cllm_\w+)(?=[\[`{])", page.read_text(encoding="utf-8"))
        series = {suffix.sub("", name) for name in named} - {"cllm_core", "cllm_server"}
        assert series <= defined, page.name
