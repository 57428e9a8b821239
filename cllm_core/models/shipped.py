"""The adapters that come with the package: a folder of `shipped/` each, with weights, settings, cllm.json and card."""

from pathlib import Path

from cllm_core.errors import ModelLoadError

DEFAULT_MODEL = "cllm-chat"
SHIPPED_FOLDER = Path(__file__).with_name("shipped")

# Of all built-in names. The Hub's old ids without an owner could collide with no other kind of name.
_PREFIX = "cllm-"


def shipped_names() -> list[str]:
    """Names of the built-in adapters, sorted; empty where this build has none."""
    return sorted(path.parent.name for path in SHIPPED_FOLDER.glob(f"{_PREFIX}*/adapter_config.json"))


def shipped_adapter(name: str) -> Path | None:
    """Folder of the built-in adapter of this name; None where the name is of another kind.

    Raises:
        ModelLoadError: it reads like one, but there is none of that name.
    """
    if not name.startswith(_PREFIX) or "/" in name:
        return None
    names = shipped_names()
    if name not in names:
        known = f"there are {', '.join(names)}" if names else "this build brings none"
        raise ModelLoadError(f"{name}: no built-in adapter of this name; {known}")
    return SHIPPED_FOLDER / name
