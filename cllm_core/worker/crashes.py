"""CrashedPrompts: which prompts were running when a worker crashed, so that one that crashes workers is refused."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from cllm_core.errors import PromptCrashedWorker
from cllm_core.request import NewRequest

_MAX_CRASHES = 2
_MAX_PROMPTS = 1024
_DIGEST_BYTES = 16


class CrashedPrompts:
    """Counts crashes by prompt, for the latest thousand of them.

    A prompt that was decoded to its end is cleared: it only ran beside the one at fault.
    """

    def __init__(self) -> None:
        self._num_crashes: OrderedDict[bytes, int] = OrderedDict()  # by digest of the prompt, oldest first

    def __len__(self) -> int:
        return len(self._num_crashes)

    def record(self, running: Iterable[NewRequest]) -> None:
        """Count a crash for the prompt of each of these requests, once for equal ones."""
        for digest in {_digest(request) for request in running}:
            self._num_crashes[digest] = self._num_crashes.pop(digest, 0) + 1
        while len(self._num_crashes) > _MAX_PROMPTS:
            self._num_crashes.popitem(last=False)

    def clear(self, request: NewRequest) -> None:
        """Forget the crashes of a prompt that was decoded."""
        if self._num_crashes:
            self._num_crashes.pop(_digest(request), None)

    def is_refused(self, request: NewRequest) -> bool:
        """Whether its prompt was running in too many crashes."""
        return bool(self._num_crashes) and self._num_crashes.get(_digest(request), 0) >= _MAX_CRASHES

    def check(self, request: NewRequest) -> None:
        """Raise PromptCrashedWorker for a prompt that is refused."""
        if self.is_refused(request):
            raise PromptCrashedWorker(
                f"this prompt was running in {_MAX_CRASHES} crashes of the worker and is refused until the server is "
                "restarted: change it, or report the crash",
                param="prompt",
            )


def _digest(request: NewRequest) -> bytes:
    """Of the prompt and its adapter."""
    text = f"{request.adapter}:{request.prompt_ids}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()
