"""Settings from a TOML file: the same names as the options, beneath options and environment."""

import tomllib
from pathlib import Path

from cllm_core.errors import ConfigError

from .names import KNOWN_SETTINGS, nearest, setting_of


def read_config_file(path: Path) -> dict[str, object]:
    """Settings by their names; lists stay lists.

    Names are those of the options, with underscores or hyphens, in the singular or plural where they may be given
    again: `max_num_seqs = 64`, `api-key = "secret"`, `adapters = ["sql=cllm-sql"]`.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has a name that no command knows.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path}: cannot be read ({error}); give the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config={path}: invalid TOML ({error})") from error
    settings: dict[str, object] = {}
    for key, value in entries.items():
        name = setting_of(key)
        if name is None:
            raise ConfigError(f"config={path}: {key}: there is no such setting{nearest(key, KNOWN_SETTINGS)}")
        if name in settings:
            raise ConfigError(f"config={path}: {key}: is given twice; leave one of them out")
        if isinstance(value, dict):
            raise ConfigError(f"config={path}: [{key}]: must be a value, not a table")
        settings[name] = value
    return settings
