"""A step's logits are those of the tokens asked for, also where a class computes all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.check_rows import CheckTexts
from cllm_core.models.forward import TransformersForward
from cllm_core.models.paged import KVCache, PagedStep, RowSpan
from cllm_core.models.probe import probe_layers
from cllm_core.models.self_check import compare_with_transformers
from tests.checkpoints import build_model


class ComputesAll(LlamaForCausalLM):
    """Knows no selection of tokens."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


class Pretends(LlamaForCausalLM):
    """Names the selection, and takes the last tokens instead."""

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | int = 0, **kwargs: Any) -> Any:
        count = logits_to_keep if isinstance(logits_to_keep, int) else len(logits_to_keep)
        return super().forward(input_ids=input_ids, logits_to_keep=count, **kwargs)


def llama(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    register_paged_attention()
    source = build_model("llama")
    model: PreTrainedModel = model_class(source.config)
    model.load_state_dict(source.state_dict())
    model.set_attn_implementation(PAGED_ATTENTION)
    model.eval()
    return model


@torch.inference_mode()
def logits_of(model: PreTrainedModel, sampled: Tensor) -> Tensor:
    ids = torch.arange(5, 17)
    cache = KVCache(probe_layers(model), num_blocks=2, block_size=8, dtype=torch.float32, device=torch.device("cpu"))
    step = PagedStep(cache, [RowSpan(0, 12, 0, (1, 0))], torch.device("cpu"))
    return TransformersForward(model)(ids, torch.arange(12), sampled, step)


@pytest.mark.parametrize("sampled", [[11], [0, 4, 11], [2, 1, 0, 0, 5, 6, 7, 8, 9, 10, 11, 11]])
def test_the_tokens_asked_for_are_the_ones_returned(sampled: list[int]) -> None:
    index = torch.tensor(sampled)
    every = logits_of(llama(LlamaForCausalLM), torch.arange(12))
    torch.testing.assert_close(logits_of(llama(LlamaForCausalLM), index), every[index])
    torch.testing.assert_close(logits_of(llama(ComputesAll), index), every[index])


def test_the_self_check_sees_through_a_class_that_returns_others() -> None:
    for model_class, is_right in ((ComputesAll, True), (Pretends, False)):
        model = llama(model_class)
        found, _ = compare_with_transformers(model, CheckTexts.draw(model, 32))
        assert found.is_rounding == is_right, model_class
