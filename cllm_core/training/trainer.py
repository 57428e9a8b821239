"""ConsistencyTrainer: transformers' Trainer on packs, so that torchrun, FSDP and reports work as users know them.

Its checkpoints hold what learns (an adapter, or all weights) in full precision, the optimiser and the random state;
as packs are a function of their number, a resumed run follows the curve of an uninterrupted one.
"""

import importlib.util
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cllm_core.errors import ConfigError
from cllm_core.training.config import RunConfig
from cllm_core.training.curves import draw_curves, write_curves
from cllm_core.training.dataset import PackDataset
from cllm_core.training.launch import world_size
from cllm_core.training.model import PackedModel

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_WEIGHTS_FILE = "trained.safetensors"
_PARTS = ("ar", "consistency")
_REPORTERS = ("wandb", "tensorboard", "mlflow")
_COUNTS = ("tokens", "examples")


class ConsistencyTrainer(Trainer):
    """Trains a PackedModel on the packs of a PackDataset, one pack per device and micro-step.

    Raises:
        ConfigError: the environment asks for FSDP in a way that cannot be had.
    """

    def __init__(self, model: PackedModel, arguments: TrainingArguments, packs: PackDataset, curves: Path) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=packs,
            data_collator=_only_pack,
            callbacks=[_CurveCallback(curves)],
        )
        require_sharding(self.accelerator.state)
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_ProgressCallback())
        self._sums: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A pack's share of the step's loss; its parts and sizes are kept for the next report."""
        outputs: dict[str, Tensor] = model(**inputs)
        for name in _PARTS:
            num_rows = float(outputs[f"num_{name}"])
            self._sums[f"{name}_loss"] += float(outputs[f"{name}_loss"]) * num_rows
            self._sums[f"num_{name}"] += num_rows
        self._sums["tokens"] += inputs["input_ids"].numel()
        self._sums["examples"] += inputs["chunk_ends"].numel()
        # Divided by the step's weights already. The Trainer divides by the packs, and devices average their gradients.
        loss = outputs["loss"] * self.current_gradient_accumulation_steps * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """The packs of a step, unrolled, each with the weights of all devices' packs, which divide the losses."""
        packs, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        model = self._packed_model()
        first = self.state.global_step * self.args.gradient_accumulation_steps
        with self.accelerator.autocast():
            unrolled = [
                self._unroll(self._prepare_inputs(pack), self._generator(first + index))
                for index, pack in enumerate(packs)
            ]
        local = torch.stack([model.weight_totals(pack) for pack in unrolled]).sum(dim=0)
        totals: Tensor = self.accelerator.reduce(local, reduction="sum")
        return [{**pack, "weight_totals": totals} for pack in unrolled], num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and the speed since the last report."""
        if self._sums:
            now = time.perf_counter()
            seconds, self._since = now - self._since, now
            for name in _PARTS:
                logs[f"{name}_loss"] = self._sums.pop(f"{name}_loss") / max(1.0, self._sums.pop(f"num_{name}"))
            for name in _COUNTS:
                count = self._sums.pop(name) * self.args.world_size  # packs are about equal
                logs |= {name: count, f"{name}_per_second": count / seconds}
            logs["seconds"] = seconds
        super().log(logs, start_time)

    def gather_weights(self) -> dict[str, Tensor]:
        """What was trained, by parameter name, on the CPU.

        Every process has to call it; with FSDP the first one alone gets values.
        """
        if not self.is_fsdp_enabled:
            return trained_weights(self._packed_model())
        gathered = self.accelerator.get_state_dict(self.model_wrapped)
        return trained_weights(self._packed_model(), gathered) if self.is_world_process_zero() else {}

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained_weights(self._packed_model(), state_dict), folder / _WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = safetensors.torch.load_file(Path(resume_from_checkpoint) / _WEIGHTS_FILE)
        parameters = dict(self._packed_model().named_parameters())
        with torch.no_grad():
            for name, value in stored.items():
                parameters[name].copy_(value)

    @cached_property
    def _unroll(self) -> Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]:
        """PackedModel.unrolled, around which FSDP gathers the weights; first used when the model is wrapped."""
        model = self._packed_model()
        register_fsdp_forward_method(model, "unrolled")
        return model.unrolled

    def _generator(self, index: int) -> torch.Generator:
        """Draws for a pack, by its number among all devices' packs: a resumed run draws as an uninterrupted one."""
        number = index * self.args.world_size + self.args.process_index
        return torch.Generator().manual_seed(random.Random(f"{self.args.seed}/{number}").getrandbits(63))

    def _packed_model(self) -> PackedModel:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PackedModel)
        return model


def trained_weights(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters that learn, by name, on the CPU.

    Args:
        model: tells which learn.
        state_dict: values gathered from several devices; None takes the model's own.
    """
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    values = learning if state_dict is None else {name: state_dict[name] for name in learning}
    return {name: value.detach().cpu().contiguous() for name, value in values.items()}


def training_arguments(run: RunConfig, output: Path, *, num_packs: int, bf16: bool) -> TrainingArguments:
    """The Trainer's settings out of ours.

    Args:
        run: our settings.
        output: folder of the run.
        num_packs: of all epochs; one epoch of the Trainer is the whole training.
        bf16: matrix products in bfloat16.
    """
    num_steps = math.ceil(num_packs / (run.packs_per_step * world_size()))
    if run.max_steps is not None:
        num_steps = min(num_steps, run.max_steps)
    use_cuda = run.device != "cpu" and torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=run.packs_per_step,
        max_steps=num_steps,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(run.warmup_ratio * num_steps),
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        bf16=bf16,
        logging_steps=run.logging_steps,
        save_steps=run.save_steps,
        save_total_limit=2,
        seed=run.seed,
        use_cpu=not use_cuda,
        train_sampling_strategy="sequential",  # PackDataset is shuffled already
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=2 if use_cuda else 0,
        dataloader_pin_memory=use_cuda,
        ddp_find_unused_parameters=False,
        report_to=_reporters(run.report_to),
    )
    if arguments.n_gpu > 1:
        logger.warning("%d GPUs are visible and one is used: start as many processes with torchrun", arguments.n_gpu)
        # As the Trainer does itself for a split model. More means DataParallel, which wants a batch of packs to split.
        arguments._n_gpu = 1
    return arguments


def last_checkpoint(output: Path) -> str | None:
    """The checkpoint to resume from, None where there is none.

    One without the Trainer's state, which is written last, is left from an interruption.
    """
    folder = output / CHECKPOINTS
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    numbers = [path.parent.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*/{TRAINER_STATE_NAME}")]
    steps = [int(number) for number in numbers if number.isdigit()]
    return str(folder / f"{prefix}{max(steps)}") if steps else None


def require_reporters(report_to: str) -> None:
    """Raise ConfigError unless every service named, comma separated, is known and its package installed."""
    for name in _reporters(report_to):
        if name not in _REPORTERS:
            raise ConfigError(f"report_to={report_to}: {name!r} is unknown; give {', '.join(_REPORTERS)} or none")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to={report_to}: package {name} is not installed; run `pip install {name}`")


def require_sharding(state: AcceleratorState) -> None:
    """Raise ConfigError where the environment asks for FSDP and accelerate would shard nothing, or could not."""
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "ACCELERATE_USE_FSDP=true: accelerate shards among several processes with a GPU each, and this is "
            f"{state.num_processes} on {state.device.type}; start them with torchrun, or unset it"
        )
    if plugin is not None and plugin.fsdp_version == 1:
        raise ConfigError(
            "FSDP_VERSION=1, accelerate's default: it cannot shard frozen bfloat16 weights and float32 adapters "
            "together; set FSDP_VERSION=2"
        )


def _reporters(report_to: str) -> list[str]:
    return [name.strip() for name in report_to.split(",") if name.strip() not in {"", "none"}]


def _only_pack(packs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch is one pack: its length is what pack_length says."""
    if len(packs) != 1:
        raise ConfigError(f"{len(packs)} packs in a batch: set pack_length instead of the Trainer's batch size")
    return packs[0]


class _CurveCallback(TrainerCallback):
    """Keeps the loss curve beside the weights: losses.jsonl with every report, losses.png with every checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            write_curves(self._folder, state.log_history)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            draw_curves(self._folder, state.log_history)


class _ProgressCallback(ProgressCallback):
    """The Trainer's bar, whose estimate of the time left stays, with the report as its postfix."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        bar: tqdm[None] | None = self.training_bar  # made when the training begins, on the first process alone
        if bar is not None and logs is not None and "loss" in logs:
            parts = [f"{name} {logs[f'{name}_loss']:.3f}" for name in _PARTS if logs[f"{name}_loss"]]
            bar.set_postfix_str(f"{', '.join(parts)}, {logs['tokens_per_second']:.0f} tokens/s")
