"""The attention function under every architecture: what it hands on and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import PAGED_ATTENTION, paged_attention, register_paged_attention


class Layer(nn.Module):
    layer_idx = 3


class Recorder:
    """A PagedAttention that returns its query, shifted by one, and keeps what it was called with."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self.layer, self.scale, self.window = layer, scale, window
        self.key_shape, self.value_shape = tuple(key.shape), tuple(value.shape)
        return query + 1


def random_states() -> tuple[Tensor, Tensor, Tensor]:
    """Query of 4 heads, key and value of 2, for 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 4, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16))
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    return query, key, value


def test_tokens_come_first_on_the_way_in_and_on_the_way_out() -> None:
    query, key, value = random_states()
    recorder = Recorder()
    out, weights = paged_attention(Layer(), query, key, value, None, scaling=0.5, paged=recorder, sliding_window=7)
    assert (recorder.layer, recorder.scale, recorder.window) == (3, 0.5, 7)
    assert recorder.key_shape == recorder.value_shape == (5, 2, 16)
    torch.testing.assert_close(out, query.transpose(1, 2) + 1)
    assert weights is None


def test_without_scale_and_window_the_usual_scale_and_the_whole_context_hold() -> None:
    recorder = Recorder()
    paged_attention(Layer(), *random_states(), None, paged=recorder)
    assert (recorder.scale, recorder.window) == (0.25, None)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_a_variant_that_the_cache_lacks_is_refused_by_name(name: str) -> None:
    extras: dict[str, Any] = {name: 30.0}
    with pytest.raises(ModelLoadError, match=f"Layer uses {name}"):
        paged_attention(Layer(), *random_states(), None, paged=Recorder(), **extras)


def test_a_model_that_drops_the_cache_on_its_way_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="does not hand keyword arguments"):
        paged_attention(Layer(), *random_states(), None)


def test_registering_twice_is_harmless() -> None:
    register_paged_attention()
    register_paged_attention()
    assert AttentionInterface()[PAGED_ATTENTION] is paged_attention
