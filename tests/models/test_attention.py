"""The attention function under every architecture: what it hands on and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import (
    PAGED_ATTENTION,
    Scoring,
    paged_attention,
    register_paged_attention,
    step_attention,
)
from cllm_core.models.paged import LayerProbe


class Layer(nn.Module):
    layer_idx = 3


class Recorder:
    """A PagedAttention that returns its query, shifted by one, and keeps what it was called with."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.layer, self.scoring = layer, scoring
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
    assert (recorder.layer, recorder.scoring) == (3, Scoring(0.5, 7))
    assert recorder.key_shape == recorder.value_shape == (5, 2, 16)
    torch.testing.assert_close(out, query.transpose(1, 2) + 1)
    assert weights is None


def test_without_scale_and_window_the_usual_scale_and_the_whole_context_hold() -> None:
    recorder = Recorder()
    paged_attention(Layer(), *random_states(), None, paged=recorder)
    assert recorder.scoring == Scoring(0.25)


def test_softcap_and_sinks_are_handed_on() -> None:
    recorder, sinks = Recorder(), torch.ones(4)
    paged_attention(Layer(), *random_states(), None, paged=recorder, softcap=30.0, s_aux=sinks)
    assert recorder.scoring.softcap == 30.0
    assert recorder.scoring.sinks is sinks
    assert recorder.scoring.features == ("logit softcap", "attention sinks")


def test_a_bias_by_position_is_refused() -> None:
    extras: dict[str, Any] = {"position_bias": torch.zeros(5)}
    with pytest.raises(ModelLoadError, match="Layer adds a bias by position"):
        paged_attention(Layer(), *random_states(), None, paged=Recorder(), **extras)


def test_a_model_that_drops_the_cache_on_its_way_finds_it_in_the_context_of_the_call() -> None:
    recorder = Recorder()
    with step_attention(recorder):
        paged_attention(Layer(), *random_states(), None)
    assert recorder.scoring == Scoring(0.25)
    with pytest.raises(ModelLoadError, match="Layer was called without a step of the paged cache"):
        paged_attention(Layer(), *random_states(), None)


def test_an_encoder_that_attends_to_later_tokens_is_refused() -> None:
    """BERT as a causal model was served as if it were a decoder."""

    class Encoder(Layer):
        is_causal = False

    with pytest.raises(ModelLoadError, match="attends to later tokens too"):
        paged_attention(Encoder(), *random_states(), None, paged=Recorder())
    with pytest.raises(ModelLoadError, match="attends to later tokens too"):
        paged_attention(Layer(), *random_states(), None, paged=Recorder(), is_causal=False)


def test_a_mask_of_the_models_own_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="attention mask of its own"):
        paged_attention(Layer(), *random_states(), torch.zeros(1, 1, 5, 5), paged=Recorder())


def test_the_result_can_be_viewed_in_any_shape() -> None:
    """AfMoE views it, which strides of a transposed result did not allow."""

    class Transposing(Recorder):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            return query.transpose(0, 1).contiguous().transpose(0, 1)

    out, _ = paged_attention(Layer(), *random_states(), None, paged=Transposing())
    assert out.view(1, 5, 64).shape == (1, 5, 64)


def test_a_layer_that_attends_twice_is_refused() -> None:
    """DiffLlama's second call took the place of the first one's values in the cache."""
    query, key, value = (x[0].transpose(0, 1) for x in random_states())
    probe = LayerProbe()
    probe.attend(0, query, key, value, Scoring(1.0))
    with pytest.raises(ModelLoadError, match="layer 0 attends more than once"):
        probe.attend(0, query, key, value, Scoring(1.0))


def test_a_window_that_sees_nothing_is_refused() -> None:
    query, key, value = (x[0].transpose(0, 1) for x in random_states())
    with pytest.raises(ModelLoadError, match="layer 0 sees a window of 0 tokens"):
        LayerProbe().attend(0, query, key, value, Scoring(1.0, window=0))


def test_registering_twice_is_harmless() -> None:
    register_paged_attention()
    register_paged_attention()
    assert AttentionInterface()[PAGED_ATTENTION] is paged_attention
