"""Fetching a repository of the Hugging Face Hub into its local cache. The one module that goes to the network."""

import io
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import tqdm, validate_repo_id  # type: ignore[attr-defined]  # documented, not re-exported

from cllm_core.errors import ModelLoadError
from cllm_core.models.progress import OnProgress

logger = logging.getLogger(__name__)


_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
_LEGACY_WEIGHTS = ["*.bin", "*.bin.index.json"]
_CODE = ["*.py"]
# Subfolders hold other formats (ONNX, original weights), but further chat templates too; consolidated.* repeats the
# weights in Mistral's own layout.
_IGNORED = [*(f"*/{files}" for files in (*_FILES, *_LEGACY_WEIGHTS, *_CODE) if files != "*.jinja"), "consolidated*"]
_TOKEN_HINT = "log in with `hf auth login` or set HF_TOKEN"


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a repository id ("owner/name" or "name"). Asks nobody."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def fetch(repo_id: str, *, revision: str | None, with_code: bool, on_progress: OnProgress) -> Path:
    """Folder of the repository's files in the Hub cache, downloaded where they are not there yet.

    Without a network the cached copy is used. Legacy .bin weights are fetched only where there are no safetensors.

    Args:
        repo_id: of the form that `is_hub_id` accepts.
        revision: branch, tag or commit; None is the main branch.
        with_code: fetch Python files too, for checkpoints that bring their own code.
        on_progress: called with the stage and the fraction (0..1) of the download.

    Raises:
        ModelLoadError: no such repository or revision, no access to it, or neither a network nor a cached copy.
    """
    stage = f"fetching {repo_id}"
    on_progress(stage, 0.0)
    patterns = [*_FILES, *(_CODE if with_code else ())]
    folder = _download(repo_id, revision, patterns, _progress_bar(stage, on_progress))
    if not any(folder.glob("*.safetensors")):
        folder = _download(repo_id, revision, [*patterns, *_LEGACY_WEIGHTS], _progress_bar(stage, on_progress))
    return folder


def _download(repo_id: str, revision: str | None, patterns: list[str], bar: type[tqdm]) -> Path:
    at = f"{repo_id}@{revision}" if revision else repo_id
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED, tqdm_class=bar
            )
        )
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{at}: access is restricted; accept its terms on the Hub's page of the model, then {_TOKEN_HINT}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{at}: the repository has no such revision; check the branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{at}: neither a local path nor a repository of the Hub; check the spelling, "
            f"or, where the repository is private, {_TOKEN_HINT}"
        ) from error
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        raise ModelLoadError(
            f"{at}: not a local path, not in the Hub cache, and the Hub cannot be asked ({_first_line(error)}); "
            "check the spelling and the network, or name a local folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _progress_bar(stage: str, on_progress: OnProgress) -> type[tqdm]:
    """A tqdm class that draws nothing and reports the bytes fetched instead."""

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})  # type: ignore[no-untyped-call]

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.unit == "B" and self.total:
                on_progress(stage, min(self.n / self.total, 1.0))

    return ReportingBar
