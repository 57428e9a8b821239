"""Float32 arithmetic inside, the weights as they were outside."""

import pytest
import torch

from cllm_core.models.exact import float32_arithmetic, is_quantised
from tests.checkpoints import build_model
from tests.models.conftest import logits_of


def test_numbers_are_those_of_a_float32_copy() -> None:
    narrow, wide = build_model("qwen3"), build_model("qwen3")
    narrow.bfloat16()
    wide.bfloat16().float()
    with float32_arithmetic(narrow):
        assert torch.equal(logits_of(narrow), logits_of(wide))
    assert not torch.equal(logits_of(narrow).float(), logits_of(wide))


def test_an_error_inside_leaves_no_wide_weight() -> None:
    model = build_model("llama")
    model.bfloat16()
    with pytest.raises(IndexError), float32_arithmetic(model):
        model(torch.tensor([[10**6]]))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_weights_of_8_bits_are_told() -> None:
    model = build_model("llama")
    assert not is_quantised(model)
    model.bfloat16()
    assert not is_quantised(model)
    layer = model.get_decoder().layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert is_quantised(model)
