"""PagedModel: a transformers causal language model that runs on the paged KV cache, as one call."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.backends.cpu.kernels import LANES, Kernels
from cllm_core.backends.cpu.step import NativeStep, can_attend
from cllm_core.backends.cpu.whole_model import NativeModel
from cllm_core.backends.cuda.static_steps import Buckets, NotRecordable, Recorder, StaticSteps
from cllm_core.backends.step_tables import StepShape, StepTables, TableAttention, TableStep, pack_tables
from cllm_core.errors import ModelLoadError
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.attention import PagedAttention
from cllm_core.models.paged import KVCache, LayerProbe, LayerSpec, PagedStep, RowSpan
from cllm_core.models.transfer import to_device

logger = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 12
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


class PagedModel:
    """Runs one step of any decoder-only architecture.

    Args:
        model: loaded with attn_implementation="cllm_paged", in eval mode, on its device.

    Raises:
        ModelLoadError: the architecture has layers that the paged cache cannot hold.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.device = model.device
        self.dtype = model.dtype
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.layers = _probe_layers(model)
        self._cache: KVCache | None = None
        self._kernels: Kernels | None = None
        self._native_model: NativeModel | None = None
        self._adapters: AdapterBank | None = None
        self._attention: TableAttention | None = None
        self._static: StaticSteps | None = None

    def use_kernels(self, kernels: Kernels | None, *, block_size: int) -> None:
        """Attend by these kernels where they cover the model's layers and this cache block size; None: by torch."""
        covered = can_attend(self.layers, self.dtype, self.device, block_size=block_size)
        self._kernels = kernels if covered else None

    def use_native_model(self) -> bool:
        """Call the model's parts without transformers between them where that changes no logit; whether it does so.

        The kernels are in place, and a NativeDecoder for the layers; else nothing happens.
        """
        native = None if self._kernels is None else NativeModel.of(self._model)
        if native is None or self._kernels is None:
            return False
        cache = KVCache(self.layers, num_blocks=1, block_size=LANES, dtype=self.dtype, device=self.device)
        step = NativeStep(self._kernels, cache, [RowSpan(0, _NUM_PROBE_TOKENS, 0, (0,))])
        index = torch.arange(_NUM_PROBE_TOKENS)
        with torch.inference_mode():
            expected = self._logits(index, index, index, step)
            if not torch.equal(native.logits(index, index, index, step), expected):
                logger.info("%s does more than call its parts: it is called as a whole", type(self._model).__name__)
                return False
        self._native_model = native
        return True

    @property
    def attends_natively(self) -> bool:
        """Whether the kernels compute attention."""
        return self._kernels is not None

    def use_attention(self, attention: TableAttention | None) -> None:
        """Attend by tables of the step, in the cache made from now on; None: by what else there is."""
        self._attention = attention

    @property
    def attends_by_tables(self) -> bool:
        """Whether attention reads the cache by tables of the step."""
        return self._attention is not None

    def use_static_steps(self, record: Recorder, *, buckets: Buckets, max_model_len: int) -> None:
        """From now on pad steps to buckets and let `record` repeat them. Needs a cache, and an attention by tables."""
        assert self._attention is not None
        assert self._cache is not None
        self._static = StaticSteps(
            self._logits,
            self._cache,
            self._attention,
            record,
            buckets=buckets,
            max_row_blocks=-(-max_model_len // self._cache.block_size),
            vocab_size=self.vocab_size,
        )

    @property
    def num_recorded(self) -> int:
        """Shapes of steps that have been recorded so far."""
        return 0 if self._static is None else self._static.num_recorded

    def use_adapters(self, adapters: AdapterBank) -> None:
        """Tell this bank, which is attached to the model, whose tokens are in a step."""
        self._adapters = adapters

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, all layers."""
        return sum(spec.num_bytes(self.dtype) for spec in self.layers)

    def allocate_cache(self, *, num_blocks: int, block_size: int) -> int:
        """Make the KV cache; returns its size in bytes."""
        # The tables of a step need a block more, for what padding stores.
        self._cache = KVCache(
            self.layers,
            num_blocks=num_blocks + (self._attention is not None),
            block_size=block_size,
            dtype=self.dtype,
            device=self.device,
        )
        return self._cache.num_bytes

    def free_cache(self) -> None:
        """Give the cache's memory back, and the static steps' with it."""
        self._cache = self._static = None

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """Compute one step.

        Args:
            input_ids: [T] int64, tokens flattened over rows.
            positions: [T] int64, their positions in their texts.
            rows: how the tokens split into rows, where each row's cache is, and its adapter; the cache is written.
            sampled: [S] int64, flat indices of the tokens whose logits are wanted.

        Returns:
            [S, V] float32 logits, valid until the next step.
        """
        if self._adapters is not None:
            self._adapters.step.begin(rows, self.device)
        static = None if self._adapters is not None and self._adapters.step.groups else self._static
        shape = None if static is None else static.shape_of(rows)
        if static is not None and shape is not None:
            try:
                return static.run(shape, input_ids, positions, rows, sampled)
            except NotRecordable as reason:
                logger.warning("steps run without being recorded from now on: %s", reason)
                self._static = None
        return self._logits(input_ids, positions, sampled, self._step(rows)).float()

    def _step(self, rows: Sequence[RowSpan]) -> PagedAttention:
        """The best attention there is for a step of its own size."""
        assert self._cache is not None
        if self._kernels is not None:
            return NativeStep(self._kernels, self._cache, rows)
        if self._attention is None:
            return PagedStep(self._cache, rows, self.device)
        shape = StepShape(len(rows), sum(row.num_tokens for row in rows))
        block_size, scratch_block = self._cache.block_size, self._cache.num_blocks - 1
        packed = pack_tables(rows, shape, block_size=block_size, scratch_block=scratch_block)
        return TableStep(self._cache, StepTables.view(to_device(packed, self.device), shape), self._attention)

    def _logits(self, input_ids: Tensor, positions: Tensor, sampled: Tensor, step: PagedAttention) -> Tensor:
        """See ForwardPass."""
        if self._native_model is not None and isinstance(step, NativeStep):
            return self._native_model.logits(input_ids, positions, sampled, step)
        out = self._model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=sampled,
            paged=step,
        )
        logits: Tensor = out.logits
        return logits[0]


def _probe_layers(model: PreTrainedModel) -> list[LayerSpec]:
    """Run one token through the model and note what each attention layer would store."""
    text_config = model.config.get_text_config()
    unknown = set(getattr(text_config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        raise ModelLoadError(f"{type(model).__name__} has layers of type {', '.join(sorted(unknown))}: not supported")
    probe = LayerProbe()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, position_ids=token, use_cache=False, paged=probe)
    num_layers = text_config.num_hidden_layers
    if sorted(probe.layers) != list(range(num_layers)):
        raise ModelLoadError(
            f"{type(model).__name__}: attention seen in {len(probe.layers)} of {num_layers} layers; "
            "only models whose every layer has attention with keys and values can run on the paged cache"
        )
    return [probe.layers[index] for index in range(num_layers)]
