"""What the engine tells about itself: the model it loaded and the state it is in.

Plain values that cross the process border; neither torch nor the layers above are imported.
"""

import msgspec

from cllm_core.request import SamplingDefaults


class TokenizerBundle(msgspec.Struct, frozen=True, kw_only=True):
    """All that is needed to turn text into tokens and back without torch or the checkpoint's files.

    Attributes:
        tokenizer_json: the file of the `tokenizers` library, as text.
        chat_template: Jinja source, None where the checkpoint has none.
        tool_use_template: Jinja source that takes the place of chat_template where functions are offered, None where
            the checkpoint has no template of its own for that.
        special_tokens: name -> text (bos_token, eos_token, ...), which chat templates may use.
    """

    tokenizer_json: str
    chat_template: str | None = None
    tool_use_template: str | None = None
    special_tokens: dict[str, str] = {}


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that is served beside the base model.

    Attributes:
        name: that requests give.
        path: what was named to load it: folder, Hub id or built-in name.
        revision: changes with its weights or settings.
        rank: the highest of its layers'.
        num_bytes: of its weights in memory.
        block_length: Jacobi block length n used where a request gives none.
        domain: what it was trained for (cllm.json), None where it does not say.
        eos_token_ids: any of them ends an output.
        tokenizer: its own, None where it has the base's.
    """

    name: str
    path: str
    revision: str
    rank: int
    num_bytes: int
    block_length: int
    domain: str | None = None
    eos_token_ids: tuple[int, ...]
    tokenizer: TokenizerBundle | None = None


class GatedInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A gated adapter: it proposes, and the model alone decides what is accepted.

    Attributes:
        path: what was named to load it.
        rank: the highest of its layers'.
        num_bytes: of its weights in memory.
        form: of its rows (EngineConfig.gated_form).
        max_rows: of a block, at most.
    """

    path: str
    rank: int
    num_bytes: int
    form: str
    max_rows: int


class DrafterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A source of drafts.

    Attributes:
        name: that requests give.
        num_bytes: memory that it holds, or may grow to, beyond the model and the texts; counted.
        resident_bytes: by which the memory of the process, or what is allocated on the device, grew while it was made.
    """

    name: str
    num_bytes: int = 0
    resident_bytes: int = 0


class ComputePath(msgspec.Struct, frozen=True):
    """How a part of the model is computed.

    Attributes:
        name: of what computes it.
        reason: why nothing faster does; None where this is the fastest there is, or nothing else was asked for.
    """

    name: str
    reason: str | None = None

    def __str__(self) -> str:
        return self.name if self.reason is None else f"{self.name} ({self.reason})"


class ComputePaths(msgspec.Struct, frozen=True, kw_only=True):
    """Which path a model takes on this machine, part by part: the backend's decisions, with their reasons.

    Attributes:
        backend: that prepared the model.
        attention: over the paged cache.
        layers: the decoder layers' products, norms and rotary embedding.
        output_layer: the product of hidden states and vocabulary.
        quantization: of the weights.
        graphs: whether steps are launched as CUDA graphs.
    """

    backend: ComputePath
    attention: ComputePath
    layers: ComputePath
    output_layer: ComputePath
    quantization: ComputePath = ComputePath("none")
    graphs: ComputePath = ComputePath("none")

    def __str__(self) -> str:
        parts = {name.replace("_", " "): getattr(self, name) for name in self.__struct_fields__}
        return "; ".join(f"{name}: {path}" for name, path in parts.items())


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker loaded and with which limits.

    Attributes:
        name: what the client asked to load: Hub id, path or the default's name.
        architecture: class name of the transformers model.
        num_parameters: of the model, adapters merged.
        device, dtype: as torch writes them ("cuda:0", "bfloat16").
        quantization: of the weights (EngineConfig.quantization), None where they are in dtype.
        eos_token_ids: any of them ends an output.
        vocab_size: valid token ids are 0..vocab_size - 1.
        block_length: Jacobi block length n used where a request gives none.
        max_model_len: longest prompt + output, in tokens.
        num_cache_blocks, cache_block_size: of the KV cache, in blocks and tokens.
        cache_bytes, weight_bytes: memory of each.
        domain: what the CLLM was trained for (cllm.json), None for a plain model.
        adapters: served beside the model, in the order they were loaded.
        drafters: sources of drafts, in the order of preference.
        gated: the adapter that proposes for requests of the model itself, None where there is none.
        sampling_defaults: used where a request leaves the fields out.
        paths: what computes which part of the model, and why.
    """

    name: str
    architecture: str
    num_parameters: int
    device: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    block_length: int
    max_model_len: int
    max_num_seqs: int
    num_cache_blocks: int
    cache_block_size: int
    cache_bytes: int
    weight_bytes: int
    quantization: str | None = None
    domain: str | None = None
    tokenizer: TokenizerBundle
    adapters: tuple[AdapterInfo, ...] = ()
    drafters: tuple[DrafterInfo, ...] = ()
    gated: GatedInfo | None = None
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    paths: ComputePaths | None = None

    @property
    def number_format(self) -> str:
        """What the model computes in, for people."""
        return self.dtype if self.quantization is None else f"{self.dtype}, {self.quantization} weights"


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine after a step, for metrics.

    Attributes:
        num_running, num_waiting: requests.
        num_free_blocks: cache blocks that hold nothing a running request needs.
        num_steps: steps since the start.
        step_seconds: wall time of the last step.
        num_step_tokens: tokens computed in the last step.
        accepted_per_row: accepted tokens of each Jacobi row of the last step.
        adapter_per_row: names of those rows' adapters, "" for the base; empty where no row has one.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_cache_blocks: int = 0
    num_steps: int = 0
    step_seconds: float = 0.0
    num_step_tokens: int = 0
    accepted_per_row: tuple[int, ...] = ()
    adapter_per_row: tuple[str, ...] = ()
