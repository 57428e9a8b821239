"""One training from settings to result; what `cllm sft` and `cllm train` run."""

import hashlib
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from transformers import PreTrainedModel

from cllm_core.errors import ConfigError, DataError
from cllm_core.evaluation.machine import describe_machine
from cllm_core.models.gated_adapter import ordinary_tokens
from cllm_core.models.progress import OnProgress
from cllm_core.training.card import TrainingFacts
from cllm_core.training.config import (
    GATED_SCALE,
    GatedConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    SftConfig,
    TeacherConfig,
    TrainConfig,
    WeightsConfig,
)
from cllm_core.training.curves import draw_curves, require_plotting
from cllm_core.training.dataset import PackDataset
from cllm_core.training.distillation import DistilledModel
from cllm_core.training.encoding import ConversationEncoder
from cllm_core.training.examples import Trajectory
from cllm_core.training.gated import GatedModel
from cllm_core.training.launch import rank, take_gpu, world_size
from cllm_core.training.model import PackedModel
from cllm_core.training.output import write_result
from cllm_core.training.prompts import Conversation, load_conversations, require_answers
from cllm_core.training.store import read_trajectories
from cllm_core.training.trainable import TrainableModel, load_teacher, load_trainable
from cllm_core.training.trainer import (
    CHECKPOINTS,
    ConsistencyTrainer,
    last_checkpoint,
    require_reporters,
    training_arguments,
)

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
# may differ between a run and its continuation
_FREE_SETTINGS = {"output", "resume", "report_to", "device", "num_threads", "logging_steps", "save_steps"}

_NO_NOISE = NoiseConfig(blocks_per_example=0)
_AR_ALONE = LossConfig(consistency_weight=0.0, target="hard")


def run_sft(config: SftConfig, on_progress: OnProgress) -> Path:
    """Fine-tune on the answers of the data; returns the folder of the result.

    Raises:
        ModelLoadError: model or adapter cannot be used.
        DataError: the data cannot be used.
        ConfigError: settings do not fit each other, or the run that the output folder holds.
    """
    trainable = _prepare(config.model, config, on_progress)
    examples, shown = _read_examples(config, trainable)
    return _train(
        config, trainable, examples, _NO_NOISE, _AR_ALONE, data=shown, teacher=_teacher(config, trainable, on_progress)
    )


def run_train(config: TrainConfig, on_progress: OnProgress) -> Path:
    """Consistency training on trajectories or on answers; returns the folder of the result. Errors as `run_sft`."""
    trainable = _prepare(config.model, config, on_progress)
    examples, shown = _read_examples(config, trainable)
    return _train(config, trainable, examples, config.noise, config.loss, data=shown, gated=config.gated)


def _read_examples(config: SftConfig | TrainConfig, trainable: TrainableModel) -> tuple[list[Trajectory], str]:
    """Prompts and answers, with the states that were recorded, and what the card calls them."""
    if config.trajectories is not None:
        examples = read_trajectories(config.trajectories, trainable.bundle)
        _claim_output(config, examples=_fingerprint(examples))
        return examples, _shown(str(config.trajectories))
    conversations = load_conversations(config.data, seed=config.run.seed)
    require_answers(conversations, config.data)
    _claim_output(config, examples=_fingerprint(conversations))
    return encode_examples(conversations, trainable.encoder), _shown(config.data.data)


def _teacher(config: SftConfig, trainable: TrainableModel, on_progress: OnProgress) -> PreTrainedModel | None:
    name = config.distillation.teacher
    return None if name is None else load_teacher(name, trainable, config.model, on_progress)


def encode_examples(conversations: Iterable[Conversation], encoder: ConversationEncoder) -> list[Trajectory]:
    """Prompts and answers as tokens, without states. Every conversation has an answer."""
    return [
        Trajectory(encoder.encode_prompt(conversation), encoder.encode_answer(conversation.answer or ""))
        for conversation in conversations
    ]


def fitting(examples: Sequence[Trajectory], max_length: int) -> list[Trajectory]:
    """Those of at most `max_length` tokens.

    Raises:
        DataError: none is.
    """
    kept = [example for example in examples if len(example.prompt_ids) + len(example.output_ids) <= max_length]
    if not kept:
        raise DataError(
            f"none of {len(examples)} examples fits max_example_length={max_length}; raise it, or give other data"
        )
    if len(kept) < len(examples):
        logger.warning(
            "%d of %d examples exceed %d tokens: left out", len(examples) - len(kept), len(examples), max_length
        )
    return kept


def _prepare(model: ModelConfig, config: SftConfig | TrainConfig, on_progress: OnProgress) -> TrainableModel:
    """Everything that can be refused before the weights are read, then the model."""
    require_plotting()
    require_reporters(config.run.report_to)
    if rank() == 0 and not config.run.resume:
        shutil.rmtree(model.output / CHECKPOINTS, ignore_errors=True)
    _claim_output(config)
    take_gpu(config.run.device)
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    return load_trainable(model, _weights(config), config.run, on_progress)


def _weights(config: SftConfig | TrainConfig) -> WeightsConfig:
    """A gated adapter starts from a larger scale than others (arXiv:2609.04010)."""
    weights = config.weights
    if isinstance(config, SftConfig) or not config.gated.gated or weights.lora_alpha is not None:
        return weights
    return msgspec.structs.replace(weights, lora_alpha=GATED_SCALE * weights.lora_rank)


def _claim_output(config: SftConfig | TrainConfig, *, examples: str | None = None) -> None:
    """Note in the output folder what makes the run; it must be that of the run that is resumed there.

    Args:
        config: the settings.
        examples: fingerprint of the data, None before it is read.
    """
    if rank() != 0:
        return
    folder = config.model.output
    path = folder / CHECKPOINTS / SETTINGS_FILE
    resumes = config.run.resume and last_checkpoint(folder) is not None and path.exists()
    before = msgspec.json.decode(path.read_bytes()) if resumes else {}
    facts = {"num_processes": world_size(), "examples": examples or before.get("examples")}
    settings = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(config, enc_hook=str))) | facts
    noted = {name: value for name, value in before.items() if value is not None}
    changed = _changed(facts | noted, settings) if resumes else []  # versions before noted no facts
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({', '.join(changed)}): give --no-resume to start anew, "
            "or another output folder"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(settings)) + b"\n")
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written ({error}); name another folder") from error


def _changed(before: object, after: object, name: str = "") -> list[str]:
    """Names of the settings that differ and must not."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted((before.keys() | after.keys()) - _FREE_SETTINGS)
        return [field for key in keys for field in _changed(before.get(key), after.get(key), key)]
    return [] if before == after else [name]


def _train(
    config: SftConfig | TrainConfig,
    trainable: TrainableModel,
    examples: Sequence[Trajectory],
    noise: NoiseConfig,
    loss: LossConfig,
    *,
    data: str,
    gated: GatedConfig | None = None,
    teacher: PreTrainedModel | None = None,
) -> Path:
    run, output = config.run, config.model.output
    kept = fitting(examples, run.max_example_length)
    is_gated = gated is not None and gated.gated
    noise_ids = ordinary_tokens(trainable.bundle, trainable.causal_lm.config.vocab_size) if is_gated else None
    packs = PackDataset(kept, noise, run, noise_ids=noise_ids)
    if isinstance(config, SftConfig) and teacher is not None:
        model: PackedModel = _distilled_model(trainable, teacher, config.distillation)
    elif gated is not None and is_gated:
        model = _gated_model(trainable, loss, gated)
    else:
        model = _packed_model(trainable, noise, loss)
    arguments = training_arguments(run, output, num_packs=len(packs), bf16=trainable.bf16)
    trainer = ConsistencyTrainer(model, arguments, packs, output)
    logger.info("%d examples in %d packs, %d optimiser steps", len(kept), len(packs), arguments.max_steps)
    trainer.train(resume_from_checkpoint=last_checkpoint(output) if run.resume else None)
    weights = trainer.gather_weights()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        draw_curves(output, history)
        last = next((entry for entry in reversed(history) if "ar_loss" in entry), {})
        facts = TrainingFacts(
            title=output.resolve().name,
            base=trainable.base_name,
            domain=config.model.domain,
            block_length=noise.block_length if noise.blocks_per_example else None,
            settings=_shown_settings(config),
            data=data,
            num_examples=len(kept),
            num_left_out=len(examples) - len(kept),
            num_steps=trainer.state.global_step,
            num_tokens=int(_total(history, "tokens")),
            seconds=_total(history, "seconds"),
            final_losses={name: last[name] for name in ("ar_loss", "consistency_loss") if last.get(name)},
            machine=_machine(trainer.args.device),
            gated=is_gated,
        )
        write_result(output, trainable, weights, facts)
    return output


def _packed_model(trainable: TrainableModel, noise: NoiseConfig, loss: LossConfig) -> PackedModel:
    return PackedModel(
        trainable.causal_lm,
        ar_weight=loss.ar_weight,
        consistency_weight=loss.consistency_weight,
        depth_decay=loss.depth_decay,
        soft=loss.target == "soft",
        temperature=loss.temperature,
        base=trainable.peft_model.disable_adapter if loss.target == "base" and trainable.peft_model else None,
        unroll=noise.unroll,
    )


def _distilled_model(
    trainable: TrainableModel, teacher: PreTrainedModel, distillation: TeacherConfig
) -> DistilledModel:
    return DistilledModel(
        trainable.causal_lm, teacher, divergence=distillation.divergence, temperature=distillation.temperature
    )


def _gated_model(trainable: TrainableModel, loss: LossConfig, gated: GatedConfig) -> GatedModel:
    assert trainable.peft_model is not None
    return GatedModel(
        trainable.causal_lm,
        base=trainable.peft_model.disable_adapter,
        depth_decay=loss.depth_decay,
        divergence=gated.divergence,
    )


def _fingerprint(examples: Iterable[Conversation] | Iterable[Trajectory]) -> str:
    """Changes with the data. Conversations count as they are given: a chat template may write today's date."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(msgspec.json.encode(example))
    return digest.hexdigest()[:16]


def _total(history: Iterable[Mapping[str, float]], name: str) -> float:
    """Sum over all reports, those of earlier parts of a resumed run included."""
    return sum(entry.get(name, 0.0) for entry in history)


def _machine(device: torch.device) -> str:
    """Hardware, versions and commit, for the record of costs."""
    machine = describe_machine()
    num_threads = machine.threads * world_size()
    hardware = machine.gpu if device.type == "cuda" else f"{machine.cpu}, {num_threads} of {machine.cores} cores"
    return f"{hardware}; torch {machine.torch}, cllm-server {machine.version}, commit {machine.commit}, {machine.date}"


def _shown_settings(config: SftConfig | TrainConfig) -> dict[str, object]:
    """The settings for the card: files by name alone, as folders of one machine mean nothing on another."""
    plain: dict[str, object] = msgspec.to_builtins(config, enc_hook=str)
    return _without_folders(plain)  # type: ignore[return-value]


def _without_folders(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    return _shown(value) if isinstance(value, str) and value.startswith(("/", "~", ".")) else value


def _shown(name: str | None) -> str:
    assert name is not None
    return Path(name).name if Path(name).expanduser().exists() else name
