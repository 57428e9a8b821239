"""How likely a model finds given answers: one plain forward pass per answer, no decoding."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError
from cllm_core.info import TokenizerBundle
from cllm_core.models.loader import LoadedModel, load_model
from cllm_core.models.progress import OnProgress


class LikelihoodScorer:
    """A model that scores answers, run by transformers with its own attention.

    Args:
        config: what to load.
        on_progress: called with (stage, fraction) while the model loads.

    Raises:
        ModelLoadError: the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress) -> None:
        self._loaded: LoadedModel = load_model(config, on_progress, attn_implementation="sdpa")

    @property
    def name(self) -> str:
        """Of the model."""
        return self._loaded.name

    @property
    def tokenizer(self) -> TokenizerBundle:
        """Of the model."""
        return self._loaded.tokenizer

    def require_same_tokens(self, other: TokenizerBundle) -> None:
        """Raise ConfigError unless the other tokenizer numbers its tokens as this model does."""
        if _vocabulary(other) != _vocabulary(self._loaded.tokenizer):
            raise ConfigError(
                f"reference {self.name}: has another vocabulary than the model whose answers it should score; "
                "name a reference of the same family"
            )

    @torch.inference_mode()
    def negative_log_likelihood(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> float:
        """Sum over the answer of -log p(token | what precedes it), natural log, computed in float32.

        Args:
            prompt_ids: at least one token.
            answer_ids: at least one token.
        """
        ids = torch.tensor([[*prompt_ids, *answer_ids]], device=self._loaded.device)
        logits: torch.Tensor = self._loaded.model(ids).logits  # [1, T, V]
        predicting = logits[0, len(prompt_ids) - 1 : -1].float()
        answer = ids[0, len(prompt_ids) :]
        return float(torch.nn.functional.cross_entropy(predicting, answer, reduction="sum"))


def _vocabulary(bundle: TokenizerBundle) -> dict[str, int]:
    vocabulary: dict[str, int] = Tokenizer.from_str(bundle.tokenizer_json).get_vocab(with_added_tokens=True)
    return vocabulary
