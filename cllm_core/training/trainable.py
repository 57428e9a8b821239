"""Loads the model to train: the base as it is served, with a LoRA adapter on top or with all weights set free."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError
from cllm_core.info import TokenizerBundle
from cllm_core.models.adapter import attach_adapter, merge_adapter
from cllm_core.models.architecture import check_architecture
from cllm_core.models.checkpoint import read_config, read_tokenizer, read_weights
from cllm_core.models.embedded import EMBEDDED_HUB_ID, EMBEDDED_NAME
from cllm_core.models.end_tokens import find_eos_token_ids
from cllm_core.models.placement import choose_device, has_bfloat16
from cllm_core.models.progress import OnProgress
from cllm_core.models.source import ModelSource, model_to_train, resolve_source
from cllm_core.models.tokenizer import build_bundle
from cllm_core.training.attention import PACK_ATTENTION, register_pack_attention
from cllm_core.training.config import ModelConfig, Precision, RunConfig, WeightsConfig
from cllm_core.training.encoding import ConversationEncoder
from cllm_core.training.store import tokenizer_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """A model ready to train.

    Attributes:
        causal_lm: on the CPU; parameters that learn require a gradient and are float32.
        peft_model: the same with its adapter's settings, None where all weights learn.
        tokenizer: of the checkpoint.
        bundle: the same, as the engine knows it.
        encoder: from conversations to its tokens.
        base_name: what an adapter shall call its base: a Hub id, or a path.
        bf16: whether matrix products are to run in bfloat16.
    """

    causal_lm: PreTrainedModel
    peft_model: peft.PeftModel | None
    tokenizer: PreTrainedTokenizerBase
    bundle: TokenizerBundle
    encoder: ConversationEncoder
    base_name: str
    bf16: bool


def load_trainable(
    model: ModelConfig, weights: WeightsConfig, run: RunConfig, on_progress: OnProgress
) -> TrainableModel:
    """Load base and adapter.

    Args:
        model: names both; `model.model` may be an adapter, which is then gone on with.
        weights: what learns. Its LoRA shape counts for a new adapter; an existing one keeps its own.
        run: precision, device, gradient_checkpointing and seed are used.
        on_progress: called with the stage and the fraction of the load.

    Raises:
        ModelLoadError: something is missing or damaged, or the adapter belongs to another base.
        ConfigError: the settings do not fit the model.
    """
    source = resolve_source(
        EngineConfig(
            model=model_to_train(model.model, model.adapter),
            adapter=model.adapter,
            trust_remote_code=model.trust_remote_code,
        ),
        on_progress,
    )
    config = read_config(source.checkpoint)
    check_architecture(source.checkpoint, config, attention=PACK_ATTENTION)
    register_pack_attention()
    bf16 = _wants_bf16(run)
    dtype = torch.bfloat16 if bf16 and not weights.full else torch.float32
    causal_lm = read_weights(
        source.checkpoint, config, dtype=dtype, device=torch.device("cpu"), attention=PACK_ATTENTION
    )
    torch.manual_seed(run.seed)  # a new adapter starts at random
    peft_model = _set_free(causal_lm, source, weights)
    if run.gradient_checkpointing:
        recompute_activations(causal_lm)
    tokenizer = read_tokenizer(source.checkpoint, config)
    bundle = build_bundle(tokenizer, model_name=source.base_name)
    return TrainableModel(
        causal_lm=causal_lm,
        peft_model=peft_model,
        tokenizer=tokenizer,
        bundle=bundle,
        encoder=ConversationEncoder(bundle, find_eos_token_ids(source.checkpoint, config, tokenizer)),
        base_name=model.base_name or _base_name(source),
        bf16=bf16,
    )


def load_teacher(name: str, student: TrainableModel, model: ModelConfig, on_progress: OnProgress) -> PreTrainedModel:
    """The frozen model that a student learns from, its adapter merged, on the CPU.

    Args:
        name: Hub id, folder or adapter.
        student: read already; its tokenizer and precision count.
        model: `trust_remote_code` is used.
        on_progress: called with the stage and the fraction of the load.

    Raises:
        ModelLoadError: something is missing or damaged.
        ConfigError: its tokenizer is another one.
    """
    source = resolve_source(EngineConfig(model=name, trust_remote_code=model.trust_remote_code), on_progress)
    config = read_config(source.checkpoint)
    check_architecture(source.checkpoint, config, attention=PACK_ATTENTION)
    bundle = build_bundle(read_tokenizer(source.checkpoint, config), model_name=source.base_name)
    if tokenizer_fingerprint(bundle) != tokenizer_fingerprint(student.bundle):
        raise ConfigError(
            f"teacher={name}: its tokenizer is not that of {student.base_name}, so their distributions are over other "
            "tokens; give a teacher of the same family"
        )
    teacher = read_weights(
        source.checkpoint,
        config,
        dtype=torch.bfloat16 if student.bf16 else torch.float32,
        device=torch.device("cpu"),
        attention=PACK_ATTENTION,
    )
    if source.adapter is not None:
        teacher = merge_adapter(teacher, source.adapter, base_name=source.base_name)
    teacher.requires_grad_(False)
    teacher.eval()
    return teacher


def recompute_activations(causal_lm: PreTrainedModel) -> None:
    """Compute activations anew in the backward pass instead of keeping them."""
    # Not left to the Trainer: its option and what it calls on the model have other names in older transformers.
    enable = getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _set_free(causal_lm: PreTrainedModel, source: ModelSource, weights: WeightsConfig) -> peft.PeftModel | None:
    if weights.full:
        if source.named_adapter is not None:
            raise ConfigError(
                f"full=True: adapter {source.named_adapter} would be lost; merge it first, or train it alone"
            )
        causal_lm.requires_grad_(True)
        return None
    if source.named_adapter is not None:
        peft_model = attach_adapter(causal_lm, source.named_adapter, base_name=source.base_name, trainable=True)
    else:
        peft_model = _new_adapter(causal_lm, weights)
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            # autocast brings float32 adapters to the precision of the activations; PEFT would do the reverse first
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return peft_model


def _new_adapter(causal_lm: PreTrainedModel, weights: WeightsConfig) -> peft.PeftModel:
    settings = peft.LoraConfig(
        r=weights.lora_rank,
        lora_alpha=weights.lora_alpha or 2 * weights.lora_rank,
        lora_dropout=weights.lora_dropout,
        target_modules=_linear_names(causal_lm),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for what it has renamed
        peft_model = peft.get_peft_model(causal_lm, settings)
    assert isinstance(peft_model, peft.PeftModel)
    return peft_model


def _linear_names(causal_lm: PreTrainedModel) -> list[str]:
    """Last names of all linear layers but the output (q_proj, ...); so named, an adapter fits no other depth."""
    head = causal_lm.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in causal_lm.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    )


def _wants_bf16(run: RunConfig) -> bool:
    precision: Precision = run.precision
    device = choose_device(run.device)  # whatever the precision: a GPU that is asked for and missing is refused here
    if precision != "auto":
        return precision == "bfloat16"
    if not has_bfloat16(device):
        logger.warning("%s has no bfloat16 in hardware: training in float32, which takes twice the memory", device)
        return False
    return True


def _base_name(source: ModelSource) -> str:
    """The embedded model goes by the Hub id it comes from; a folder by its full path, as adapters move."""
    if source.base_name == EMBEDDED_NAME:
        return EMBEDDED_HUB_ID
    path = Path(source.base_name).expanduser()
    return str(path.resolve()) if path.exists() else source.base_name
