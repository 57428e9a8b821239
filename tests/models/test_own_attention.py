"""Classes that compute attention in their own code: taught to ask the step, and as before outside of one."""

import pytest
import torch
from transformers import PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import ALIBI, PAGED_ATTENTION, register_paged_attention
from cllm_core.models.check_rows import CheckTexts
from cllm_core.models.checkpoint import quiet
from cllm_core.models.own_attention import teach_paging
from cllm_core.models.probe import probe_layers
from cllm_core.models.self_check import compare_with_transformers
from tests.models.conftest import logits_of
from tests.tiny_models import build_tiny, tiny_config


def taught(model_type: str, **settings: object) -> PreTrainedModel:
    register_paged_attention()
    model = build_tiny(tiny_config(model_type, **settings))
    with quiet():
        model.set_attn_implementation(PAGED_ATTENTION)
    teach_paging(model)
    return model


@pytest.mark.parametrize("num_heads", [4, 6], ids=["heads are a power of two", "heads are none"])
@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_alibi_on_the_paged_cache_equals_transformers(model_type: str, num_heads: int) -> None:
    name = "n_head" if model_type == "bloom" else "n_heads"
    width = "hidden_size" if model_type == "bloom" else "d_model"
    model = taught(model_type, **{name: num_heads, width: 16 * num_heads})
    assert {spec.features for spec in probe_layers(model)} == {(ALIBI,)}
    found, _ = compare_with_transformers(model, CheckTexts.draw(model, 100))
    assert found.nats < 1e-3


def test_weights_keep_their_names_and_text_outside_of_a_step_its_numbers() -> None:
    plain, model = build_tiny(tiny_config("falcon")), taught("falcon")
    assert plain.state_dict().keys() == model.state_dict().keys()
    with quiet():
        model.set_attn_implementation("sdpa")
    assert torch.equal(logits_of(plain), logits_of(model))


def test_falcon_with_alibi_is_refused() -> None:
    """Eager attention adds it twice, sdpa once."""
    with pytest.raises(ModelLoadError, match="Falcon with ALiBi is not supported"):
        probe_layers(taught("falcon", alibi=True))
