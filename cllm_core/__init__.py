"""Batched Jacobi decoding for Consistency LLMs: engine, worker, training and evaluation.

`import cllm_core` loads no torch; `LLM` does when it is first touched.
"""

from typing import TYPE_CHECKING, Any

from cllm_core.request import SamplingParams

if TYPE_CHECKING:
    from cllm_core.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from cllm_core.llm import LLM  # noqa: PLC0415

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
