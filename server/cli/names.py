"""The names of settings: as flag, in the environment and in a settings file. Unknown ones are refused."""

import difflib
import re
import typing
from collections.abc import Iterable, Mapping

from pydantic.fields import FieldInfo

from cllm_core.errors import ConfigError

from ..cluster.settings import ClusterSettings
from ..engine_settings import ENV_PREFIX

CONFIG_VARIABLE = "CLLM_CONFIG"

KNOWN_SETTINGS = frozenset(ClusterSettings.model_fields)
"""Settings of all commands; a command passes over those of the others."""

_SINGULAR = {"api_keys": "CLLM_API_KEY", "admin_keys": "CLLM_ADMIN_KEY"}
"""Second names of the variables that must never be missed: without them a server is open."""

# Not settings: the cache of converted models, and what docker compose and the tests read.
_OTHER_VARIABLES = frozenset(
    {CONFIG_VARIABLE, "CLLM_CACHE_DIR", "CLLM_PUBLISH", "CLLM_CLIENTS", "CLLM_TEST_FULL_INSTALL"}
)

# Kubernetes describes every Service of a namespace to its pods this way; one may be called `cllm`.
_SERVICE_LINK = re.compile(
    rf"{ENV_PREFIX}(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


def flag_of(name: str, info: FieldInfo) -> str:
    """The flag of a settings field; one that may be given again is named in the singular."""
    plural = "es" if name.endswith("ses") else "s"
    stem = name.removesuffix(plural) if is_list(info) else name
    return "--" + stem.replace("_", "-")


def setting_of(key: str) -> str | None:
    """The setting that a key of a settings file names: as its flag, or as the setting itself; None for none."""
    name = key.replace("-", "_")
    if name in KNOWN_SETTINGS:
        return name
    flags = {flag_of(setting, info): setting for setting, info in ClusterSettings.model_fields.items()}
    return flags.get("--" + key.replace("_", "-"))


def is_list(info: FieldInfo) -> bool:
    """Whether a setting may be given again."""
    return typing.get_origin(info.annotation) is tuple


def variables_of(setting: str) -> list[str]:
    """Environment variables that a setting is read from, the one in use first."""
    plain = f"{ENV_PREFIX}{setting}".upper()
    return [plain, _SINGULAR[setting]] if setting in _SINGULAR else [plain]


def require_known_variables(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where a variable looks like a setting and is none, or where keys are not clear."""
    known = {name for setting in KNOWN_SETTINGS for name in variables_of(setting)} | _OTHER_VARIABLES
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name):
            raise ConfigError(f"{name}: there is no such setting{nearest(name, known)}")
    for setting in _SINGULAR:
        given = [name for name in variables_of(setting) if name in environment]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} mean the same setting; unset one of them")
        if given and not environment[given[0]].strip(" ,"):
            raise ConfigError(f"{given[0]}: is set, but names no key; give one, or unset it")


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is unknown, to be put behind what is wrong."""
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else "; `cllm serve --help` lists them"
