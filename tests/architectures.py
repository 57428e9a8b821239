"""The architectures of the tiny checkpoints; apart from `tests.checkpoints` so that naming one imports no torch."""

from typing import Literal

Architecture = Literal["llama", "mistral", "qwen2", "qwen2-sliding", "qwen3"]
