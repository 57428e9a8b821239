"""llama.cpp's architectures in transformers' terms: keys and attributes, names of weights, and how values are stored.

Each class reads a configuration from a file's keys and gives the keys for one. A key or tensor of a file that its class
does not read is refused by name. On the way out, the written keys must give back the configuration, so what a class
does not write is refused, too. The tables follow llama.cpp's loader (src/models) and converter, and
tests/readers/test_llama_cpp.py compares both sides' logits.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

from cllm_core.models.frequencies import head_size_of
from cllm_core.models.gguf.file import Value
from cllm_core.models.gguf.rope import read_base, read_rope, write_rope
from cllm_core.models.gguf.source import ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT, ROPE_FREQS, Source

Attributes = dict[str, Any]
Written = tuple[dict[str, Value], dict[str, Tensor]]

_FULL, _SLIDING = "full_attention", "sliding_attention"
_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTER_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Architecture:
    """What most decoders share.

    Attributes:
        name: llama.cpp's.
        config_class: transformers' configuration that a file is read as.
        also_written: configurations that compute the same and can be written, too.
        integers, numbers: keys with a value that transformers has as well, and its names for them.
        top, block: modules outside of the decoder layers and within one, by llama.cpp's names.
        rope_tensors: tensors of factors that llama.cpp reads.
        has_head_size: whether heads may have another size than the model's width divided by their number.
        rotates_parts: whether the rest of a head may stay unrotated.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    also_written: ClassVar[tuple[type[PreTrainedConfig], ...]] = ()
    integers: ClassVar[Mapping[str, str]] = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
    }
    numbers: ClassVar[Mapping[str, str]] = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
    top: ClassVar[Mapping[str, str]] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    block: ClassVar[Mapping[str, str]] = _BLOCK
    rope_tensors: ClassVar[tuple[str, ...]] = ()
    has_head_size: ClassVar[bool] = True
    rotates_parts: ClassVar[bool] = False

    def read(self, source: Source) -> Attributes:
        """Attributes of `config_class`.

        Raises:
            ModelLoadError: a key is missing, or has a value that transformers' model does not compute with.
        """
        keys = source.keys
        vocabulary = source.num_rows("token_embd.weight")
        attributes: Attributes = {name: keys.integer(key) for key, name in self.integers.items()}
        attributes |= {name: keys.number(key) for key, name in self.numbers.items()}
        heads = attributes["num_attention_heads"]
        attributes["num_key_value_heads"] = keys.integer("attention.head_count_kv", heads)
        attributes["vocab_size"] = vocabulary
        attributes["tie_word_embeddings"] = "output.weight" not in source.shapes
        if keys.integer("vocab_size", vocabulary) != vocabulary:
            raise keys.wrong("vocab_size", f"but token_embd.weight has {vocabulary} rows")
        if not keys.flag("attention.causal", default=True):
            raise keys.wrong("attention.causal", "but only causal models are served")
        keys.ignore(["tensor_data_layout"])
        head_size = self._read_head_size(source, attributes["hidden_size"], heads)
        if self.has_head_size:
            attributes["head_dim"] = head_size
        return attributes | {"rope_parameters": self._read_rope(source, head_size)}

    def _read_head_size(self, source: Source, width: int, heads: int) -> int:
        keys = source.keys
        head_size = keys.integer("attention.key_length", width // heads)
        if keys.integer("attention.value_length", head_size) != head_size:
            raise keys.wrong("attention.value_length", f"but attention.key_length is {head_size}")
        if not self.has_head_size and head_size * heads != width:
            raise keys.wrong("attention.key_length", f"but {heads} heads share a width of {width}")
        return head_size

    def _read_rope(self, source: Source, head_size: int) -> Attributes:
        parameters = read_rope(source, head_size=head_size)
        if "partial_rotary_factor" in parameters and not self.rotates_parts:
            raise source.keys.wrong("rope.dimension_count", f"but heads of {head_size} are rotated as a whole")
        return parameters

    def write(self, config: PreTrainedConfig) -> Written:
        """Keys below the architecture's prefix, and tensors beside the model's weights.

        Raises:
            ValueError: GGUF has no place for a value of the configuration; the message names it.
        """
        keys: dict[str, Value] = {key: int(getattr(config, name)) for key, name in self.integers.items()}
        keys |= {key: float(getattr(config, name)) for key, name in self.numbers.items()}
        keys |= {
            "vocab_size": int(config.vocab_size),
            "attention.head_count_kv": int(config.num_key_value_heads),
            "attention.key_length": head_size_of(config),
            "attention.value_length": head_size_of(config),
        }
        rope_keys, factors = self._write_rope(config)
        return keys | rope_keys, factors

    def _write_rope(self, config: PreTrainedConfig) -> Written:
        return write_rope(config)

    def stored(self, part: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """A weight of transformers as llama.cpp wants it; `part` is llama.cpp's name of the module."""
        return tensor

    def restored(self, part: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """The inverse of `stored`."""
        return tensor


class Llama(Architecture):
    """Llama, Mistral and the many built like them. llama.cpp rotates neighbouring dimensions of a head together."""

    name = "llama"
    config_class: ClassVar[type[PreTrainedConfig]] = LlamaConfig
    also_written: ClassVar[tuple[type[PreTrainedConfig], ...]] = (MistralConfig,)
    rope_tensors: ClassVar[tuple[str, ...]] = (ROPE_FREQS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT)

    def read(self, source: Source) -> Attributes:
        """With the biases that the file has; mixtures of experts, which share the name, are refused."""
        for key in ("expert_count", "expert_used_count"):
            if source.keys.integer(key, 0):
                raise source.keys.wrong(key, "but mixtures of experts are not read from GGUF")
        return super().read(source) | {
            "attention_bias": "blk.0.attn_q.bias" in source.shapes,
            "mlp_bias": "blk.0.ffn_gate.bias" in source.shapes,
        }

    def stored(self, part: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """Queries and keys in llama.cpp's order of dimensions."""
        heads = _num_rotated_heads(part, config)
        return tensor if heads is None else interleave_rotary(tensor, heads)

    def restored(self, part: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """Queries and keys in transformers' order of dimensions."""
        heads = _num_rotated_heads(part, config)
        return tensor if heads is None else separate_rotary(tensor, heads)


def _num_rotated_heads(part: str, config: PreTrainedConfig) -> int | None:
    heads: dict[str, int] = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(part)


def interleave_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from the halves that transformers rotates to the neighbours that llama.cpp rotates.

    Args:
        weight: [num_heads * D, ...], a query or key projection, or its bias.
        num_heads: of queries or of keys.
    """
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def separate_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `interleave_rotary`."""
    return weight.reshape(num_heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


class Granite(Llama):
    """Granite 3 and 4: a Llama whose embeddings, residual sums, attention scores and logits are scaled."""

    name = "granite"
    config_class: ClassVar[type[PreTrainedConfig]] = GraniteConfig
    also_written: ClassVar[tuple[type[PreTrainedConfig], ...]] = ()
    numbers: ClassVar[Mapping[str, str]] = {
        **Llama.numbers,
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    has_head_size = False

    def read(self, source: Source) -> Attributes:
        """Without files whose layers do not rotate, which llama.cpp knows by a key of another meaning elsewhere."""
        if not source.keys.flag("rope.scaling.finetuned", default=True):
            raise source.keys.wrong("rope.scaling.finetuned", "but only models that rotate are read")
        return super().read(source)


class SmolLM3(Llama):
    """SmolLM 3: every fourth layer does not rotate."""

    name = "smollm3"
    config_class: ClassVar[type[PreTrainedConfig]] = SmolLM3Config
    also_written: ClassVar[tuple[type[PreTrainedConfig], ...]] = ()
    rope_tensors: ClassVar[tuple[str, ...]] = ()
    has_head_size = False


class Qwen2(Architecture):
    """Qwen 1.5, 2 and 2.5."""

    name = "qwen2"
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen2Config
    has_head_size = False


class Qwen3(Architecture):
    """Qwen 3."""

    name = "qwen3"
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen3Config
    block: ClassVar[Mapping[str, str]] = _BLOCK | _QK_NORMS


class Gemma(Architecture):
    """Gemma. Norms scale by 1 + weight in transformers, by the weight in llama.cpp."""

    name = "gemma"
    config_class: ClassVar[type[PreTrainedConfig]] = GemmaConfig

    def stored(self, part: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """Norms as factors."""
        return tensor.float() + 1.0 if part.endswith("_norm") else tensor

    def restored(self, part: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """Norms as what is added to 1."""
        return tensor.float() - 1.0 if part.endswith("_norm") else tensor


class Gemma2(Gemma):
    """Gemma 2: sliding windows in every other layer, and soft caps. Where keys are missing, llama.cpp's values hold."""

    name = "gemma2"
    config_class: ClassVar[type[PreTrainedConfig]] = Gemma2Config
    block: ClassVar[Mapping[str, str]] = _BLOCK | _OUTER_NORMS
    sliding_window: ClassVar[int] = 4096
    window_pattern: ClassVar[int] = 2
    layers_of_27b: ClassVar[int] = 46

    def read(self, source: Source) -> Attributes:
        """With windows, soft caps and the scale of the queries."""
        keys = source.keys
        attributes = super().read(source)
        window = keys.integer("attention.sliding_window", self.sliding_window)
        return (
            attributes
            | self._read_caps(source)
            | {
                "query_pre_attn_scalar": self._query_scalar(attributes),
                "sliding_window": window or None,
                "layer_types": self._read_layer_types(source, attributes["num_hidden_layers"], window),
            }
        )

    def _query_scalar(self, attributes: Attributes) -> int:
        """GGUF does not say it: llama.cpp takes a head's size, and for the 27B model what its published one has."""
        width, heads = int(attributes["hidden_size"]), int(attributes["num_attention_heads"])
        return width // heads if attributes["num_hidden_layers"] == self.layers_of_27b else int(attributes["head_dim"])

    def _read_caps(self, source: Source) -> Attributes:
        return {
            "attn_logit_softcapping": source.keys.number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": source.keys.number("final_logit_softcapping", 30.0),
        }

    def _read_layer_types(self, source: Source, num_layers: int, window: int) -> list[str]:
        """Every n-th layer sees everything; newer files may say it of each layer."""
        key = "attention.sliding_window_pattern"
        if source.keys.is_array(key):
            slides = [bool(value) for value in source.keys.numbers(key)]
            if len(slides) != num_layers:
                raise source.keys.wrong(key, f"but there are {num_layers} layers")
        else:
            pattern = source.keys.integer(key, self.window_pattern)
            slides = [pattern == 0 or index % pattern < pattern - 1 for index in range(num_layers)]
        return [_SLIDING if slide and window else _FULL for slide in slides]

    def write(self, config: PreTrainedConfig) -> Written:
        """With windows and soft caps."""
        keys, factors = super().write(config)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, name) is not None:
                keys[name] = float(getattr(config, name))
        if config.sliding_window is not None and _SLIDING in config.layer_types:
            keys["attention.sliding_window"] = int(config.sliding_window)
        return keys, factors


class Gemma3(Gemma2):
    """The text model of Gemma 3: layers with a window have rotary embeddings of their own, which nothing scales."""

    name = "gemma3"
    config_class: ClassVar[type[PreTrainedConfig]] = Gemma3TextConfig
    block: ClassVar[Mapping[str, str]] = _BLOCK | _OUTER_NORMS | _QK_NORMS
    sliding_window: ClassVar[int] = 0
    window_pattern: ClassVar[int] = 6
    layers_of_27b: ClassVar[int] = 62

    def _read_caps(self, source: Source) -> Attributes:
        cap = source.keys.number("final_logit_softcapping", 0.0)
        return {"attn_logit_softcapping": None, "final_logit_softcapping": cap or None}

    def _read_rope(self, source: Source, head_size: int) -> Attributes:
        local = {"rope_type": "default", "rope_theta": read_base(source, "rope.freq_base_swa")}
        return {_FULL: super()._read_rope(source, head_size), _SLIDING: local}

    def _write_rope(self, config: PreTrainedConfig) -> Written:
        keys, factors = write_rope(config, _FULL)
        local, _ = write_rope(config, _SLIDING)
        return keys | {"rope.freq_base_swa": local["rope.freq_base"]}, factors


class Phi3(Architecture):
    """Phi 3, 3.5 and 4: fused projections, long contexts by factors, in Phi 4 mini of a part of each head."""

    name = "phi3"
    config_class: ClassVar[type[PreTrainedConfig]] = Phi3Config
    block: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }
    rope_tensors: ClassVar[tuple[str, ...]] = (ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT)
    has_head_size = False
    rotates_parts = True

    def read(self, source: Source) -> Attributes:
        """With the window, which llama.cpp leaves out for this architecture, and the context before it was extended."""
        keys = source.keys
        attributes = super().read(source)
        return attributes | {
            "sliding_window": keys.integer("attention.sliding_window", 0) or None,
            "original_max_position_embeddings": keys.integer(
                "rope.scaling.original_context_length", attributes["max_position_embeddings"]
            ),
        }

    def write(self, config: PreTrainedConfig) -> Written:
        """With the window and the context before it was extended."""
        keys, factors = super().write(config)
        keys["rope.scaling.original_context_length"] = int(config.original_max_position_embeddings)
        keys["attention.sliding_window"] = int(config.sliding_window or 0)
        return keys, factors


class StarCoder2(Architecture):
    """StarCoder 2: layer norms, and biases everywhere."""

    name = "starcoder2"
    config_class: ClassVar[type[PreTrainedConfig]] = Starcoder2Config
    numbers: ClassVar[Mapping[str, str]] = {"attention.layer_norm_epsilon": "norm_epsilon"}
    block: ClassVar[Mapping[str, str]] = {
        **{part: module for part, module in _BLOCK.items() if part != "ffn_gate"},
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    has_head_size = False


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    architecture.name: architecture
    for architecture in (
        Llama(),
        Granite(),
        SmolLM3(),
        Qwen2(),
        Qwen3(),
        Gemma(),
        Gemma2(),
        Gemma3(),
        Phi3(),
        StarCoder2(),
    )
}


def architecture_written_as(config: PreTrainedConfig) -> Architecture | None:
    """The architecture that a configuration is written as, None where there is none."""
    for architecture in ARCHITECTURES.values():
        if type(config) in (architecture.config_class, *architecture.also_written):
            return architecture
    return None
