"""From what the user named (a Hub id, a folder, a GGUF file, an adapter, or nothing) to files on the disk."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.models.checkpoint import Checkpoint
from cllm_core.models.cllm_json import PUBLISHED, CllmCard, read_card
from cllm_core.models.embedded import EMBEDDED_HUB_ID, EMBEDDED_NAME, embedded_folder, has_embedded
from cllm_core.models.gguf.file import is_later_part
from cllm_core.models.hub import fetch, is_hub_id
from cllm_core.models.progress import OnProgress
from cllm_core.models.shipped import DEFAULT_MODEL, shipped_adapter

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load.

    Attributes:
        name: what the user named, or the default's name.
        checkpoint: the model, or the adapter's base.
        base_name: how the checkpoint itself is called; equal to `name` unless an adapter was named instead of it.
        adapter: folder of a PEFT adapter to merge, None for none.
        gated_adapter: folder of one that proposes beside the checkpoint, None for none.
        card: the merged adapter's cllm.json, else the checkpoint's, else what is known of the Hub id; else None.
    """

    name: str
    checkpoint: Checkpoint
    base_name: str
    adapter: Path | None = None
    gated_adapter: Path | None = None
    card: CllmCard | None = None

    @property
    def named_adapter(self) -> Path | None:
        """The adapter that the user named, merged or gated; None where only a model was named."""
        return self.adapter or (self.gated_adapter if self.name != self.base_name else None)


def resolve_source(config: EngineConfig, on_progress: OnProgress) -> ModelSource:
    """Find the files of `config.model` and `config.adapter`; fetch or convert them where they are not on the disk.

    Where nothing is named it is the default, a built-in adapter on the embedded model; with adapters served beside it,
    which stand on the same base, the embedded model alone. A model that holds only an adapter, and an adapter without a
    model, stand on the base that the adapter names. The Hub id of the embedded model, named as such a base, means the
    embedded copy where its package is installed.

    Raises:
        ModelLoadError: something named does not exist, cannot be had, or is no checkpoint.
    """
    if config.model is None and config.adapter is None and not config.adapters and config.adapter_root is None:
        config = msgspec.structs.replace(config, model=DEFAULT_MODEL)
    model = None if config.model is None else _locate(config.model, "model", config, on_progress)
    if model is not None and _is_adapter(model):
        if config.adapters:
            raise ModelLoadError(
                f"{config.model}: is itself an adapter, so adapters {', '.join(config.adapters)} cannot be served "
                "beside it; name the base as model, and this adapter among the others"
            )
        if config.adapter is not None:
            raise ModelLoadError(
                f"{config.model}: is itself an adapter, so adapter {config.adapter} cannot be merged too; "
                "merge one first, or name the base as model"
            )
        return _on_its_base(str(config.model), model, config, on_progress)
    if config.adapter is None:
        checkpoint, name = _checkpoint_or_default(model, config, on_progress)
        gated, card = _gated_adapter_in(checkpoint.folder), read_card(checkpoint.folder) or PUBLISHED.get(name)
        return ModelSource(name, checkpoint, name, gated_adapter=gated, card=card)
    adapter = locate_adapter(config.adapter, config, on_progress)
    if config.model is None:
        return _on_its_base(config.adapter, adapter, config, on_progress)
    checkpoint, name = _checkpoint_or_default(model, config, on_progress)
    return ModelSource(name, checkpoint, name, adapter, card=read_card(adapter) or read_card(checkpoint.folder))


def model_to_train(model: str | None, adapter: str | None) -> str | None:
    """What to name as the model of a training: by default the embedded model, not the built-in adapter on it."""
    return EMBEDDED_NAME if model is None and adapter is None else model


def locate_adapter(name: str, config: EngineConfig, on_progress: OnProgress) -> Path:
    """Folder of the PEFT adapter called `name`: a path, a built-in name or a Hub id.

    Raises:
        ModelLoadError: it does not exist, cannot be had, or is no adapter.
    """
    return _require_adapter(_locate(name, "adapter", config, on_progress), name)


def locate_adapter_below(root: str | None, name: str) -> Path:
    """Folder of an adapter that a client of the server named: below `root`, or a built-in one.

    Args:
        root: folder that clients may load from; None: they may not load at all.
        name: a path, relative to `root` unless absolute, or a built-in name.

    Raises:
        ModelLoadError: it lies outside, or is no adapter.
    """
    if root is None:
        raise ModelLoadError("adapters cannot be loaded while serving: the worker was started without adapter_root")
    if (shipped := shipped_adapter(name)) is not None:
        return shipped
    allowed = Path(root).expanduser().resolve()
    folder = (allowed / name).resolve()
    # Before anything is looked up there: the answer must not tell what exists elsewhere.
    if not folder.is_relative_to(allowed):
        raise ModelLoadError(f"{name}: lies outside of the folder that adapters may be loaded from")
    return _require_adapter(folder, name)


def is_gated(adapter: Path) -> bool:
    """Whether an adapter's cllm.json says that it only proposes."""
    card = read_card(adapter)
    return card is not None and card.gated


def _gated_adapter_in(folder: Path) -> Path | None:
    """The gated adapter in a model's folder, where it was published as Uno's are; None for none."""
    beside = folder / "adapter"
    return beside if _is_adapter(beside) else None


def _require_adapter(folder: Path, name: str) -> Path:
    if not _is_adapter(folder):
        raise ModelLoadError(f"{name}: has no {_ADAPTER_CONFIG}; name a folder or Hub id of a PEFT adapter")
    return folder


def _on_its_base(name: str, adapter: Path, config: EngineConfig, on_progress: OnProgress) -> ModelSource:
    base_name = _base_of(adapter)
    if base_name is None or (base_name == EMBEDDED_HUB_ID and has_embedded()):
        checkpoint, base_name = _checkpoint_or_default(None, config, on_progress)
    else:
        base = _locate_base(base_name, adapter, config, on_progress)
        if _is_adapter(base):
            raise ModelLoadError(f"{adapter}: its base {base_name} is an adapter too; merge that one first")
        checkpoint = _as_checkpoint(base, config)
    if is_gated(adapter):
        return ModelSource(name, checkpoint, base_name, gated_adapter=adapter, card=read_card(checkpoint.folder))
    return ModelSource(name, checkpoint, base_name, adapter, card=read_card(adapter) or read_card(checkpoint.folder))


def _checkpoint_or_default(model: Path | None, config: EngineConfig, on_progress: OnProgress) -> tuple[Checkpoint, str]:
    if model is None:
        return Checkpoint(embedded_folder(on_progress)), EMBEDDED_NAME
    return _as_checkpoint(model, config), str(config.model)


def _as_checkpoint(path: Path, config: EngineConfig) -> Checkpoint:
    """The checkpoint at a folder or a GGUF file; a folder with nothing but one GGUF model means that."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelLoadError(f"{path}: a single file must be a .gguf; for other formats name their folder")
        return Checkpoint(path.parent, path.name, config.trust_remote_code)
    gguf_files = sorted(file for file in path.glob("*.gguf") if not is_later_part(file))
    if gguf_files and not (path / "config.json").exists():
        if len(gguf_files) > 1:
            names = ", ".join(file.name for file in gguf_files)
            raise ModelLoadError(f"{path}: holds several GGUF files ({names}); name one of them")
        return Checkpoint(path, gguf_files[0].name, config.trust_remote_code)
    return Checkpoint(path, trust_remote_code=config.trust_remote_code)


def _is_adapter(path: Path) -> bool:
    return (path / _ADAPTER_CONFIG).is_file() and not (path / "config.json").exists()


def _base_of(adapter: Path) -> str | None:
    """What the adapter says it was trained on, None where it does not say."""
    path = adapter / _ADAPTER_CONFIG
    try:
        base = json.loads(path.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({error}); fetch or save the adapter again") from error
    return str(base) if base else None


def _locate_base(name: str, adapter: Path, config: EngineConfig, on_progress: OnProgress) -> Path:
    beside = adapter / name
    if beside.exists():
        return beside
    return _locate(name, f"base of adapter {adapter}", config, on_progress)


def _locate(name: str, role: str, config: EngineConfig, on_progress: OnProgress) -> Path:
    """The existing path called `name`, else the built-in model, else the Hub repository in the Hub cache."""
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if name == EMBEDDED_NAME:
        return embedded_folder(on_progress)
    if (shipped := shipped_adapter(name)) is not None:
        return shipped
    if _looks_like_path(name) or not is_hub_id(name):
        raise ModelLoadError(f"{role} {name}: no such file or folder (and no Hub id: those read owner/name)")
    revision = config.revision if name == config.model else None
    return fetch(name, revision=revision, with_code=config.trust_remote_code, on_progress=on_progress)


def _looks_like_path(name: str) -> bool:
    separators = {os.sep, "/", "\\"}
    return (
        name.startswith((".", "~", *separators))
        or name.endswith((".gguf", ".safetensors", ".bin", *separators))
        or sum(name.count(separator) for separator in separators) > 1
    )
