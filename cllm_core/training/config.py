"""Settings of `cllm sft`, `cllm trajectories` and `cllm train`: frozen, refused where they are built.

Each field's description is the help text of its command line option; a struct within a struct is a panel of options.
No torch in here, so that `--help` is instant.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cllm_core.config import DEFAULT_BLOCK_LENGTH, MAX_BLOCK_LENGTH, DeviceName
from cllm_core.errors import ConfigError

Schedule = Literal["constant", "growing", "cyclic"]
Consistency = Literal["global", "local"]
Target = Literal["soft", "hard", "base"]
Divergence = Literal["l1", "kl", "ce"]
TeacherDivergence = Literal["forward", "reverse", "jsd"]
Precision = Literal["auto", "bfloat16", "float32"]

GATED_SCALE = 16
"""Alpha over rank of a new gated adapter."""

MAX_UNROLL = 16  # iterations, each a forward pass


def require(condition: bool, name: str, value: object, bounds: str) -> None:
    """Raise ConfigError, naming field, value and what it must be, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name}={value}: must be {bounds}")


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where prompts and answers come from."""

    data: Annotated[
        str | None,
        Meta(
            description='Prompts: a .jsonl file (lines {"prompt", "answer"?} or {"messages"}), a Spider .json file '
            "with --tables, or the name of a Hugging Face dataset."
        ),
    ] = None
    tables: Annotated[Path | None, Meta(description="Spider's tables.json; makes --data a Spider file.")] = None
    split: Annotated[str, Meta(description="Split of a Hugging Face dataset.")] = "train"
    prompt_column: Annotated[str, Meta(description="Its column with the user's message or a list of messages.")] = (
        "prompt"
    )
    answer_column: Annotated[str, Meta(description="Its column with the answer, where there is one.")] = "answer"
    limit: Annotated[int | None, Meta(description="Use only the first so many prompts.")] = None
    renamings: Annotated[
        int, Meta(description="Spider only: copies of every example with names in another style and order.")
    ] = 0

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "limit", self.limit, ">= 1")
        require(self.renamings >= 0, "renamings", self.renamings, ">= 0")
        if self.renamings and self.tables is None:
            raise ConfigError(f"renamings={self.renamings}: needs the schemas of Spider; give tables")


def _default(config_type: type[msgspec.Struct], name: str) -> object:
    return next(field.default for field in msgspec.structs.fields(config_type) if field.name == name)


def _require_no_options(data: DataConfig, *, instead: str) -> None:
    """Raise ConfigError where an option of `data` is given that nothing would read."""
    for name in data.__struct_fields__:
        if getattr(data, name) != getattr(DataConfig(), name):
            raise ConfigError(f"{name}={getattr(data, name)}: tells how data is read; with {instead} leave it out")


class NoiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How noisy blocks are chosen."""

    block_length: Annotated[
        int, Meta(description="Jacobi block length n to train for; a block has at most n - 1 tokens.")
    ] = DEFAULT_BLOCK_LENGTH
    blocks_per_example: Annotated[
        int, Meta(description="States per example and epoch, spread over the answer; 0 trains AR alone.")
    ] = 4
    consistency: Annotated[
        Consistency,
        Meta(description="What a state has to predict: the fixed point (global) or the next state (local)."),
    ] = "global"
    synthetic_ratio: Annotated[
        float, Meta(description="Share of blocks made up at random; answers without states have such blocks only.")
    ] = 0.0
    # the data augmentation of arXiv:2403.00835, section 3.2: patterns like "wrong, right, wrong" are rare by nature
    corrected_ratio: Annotated[
        float, Meta(description="Probability with which a wrong token of a recorded state is set right.")
    ] = 0.0
    unroll: Annotated[
        int,
        Meta(
            description="Jacobi iterations of the model in training that drafts go through before they are learned "
            "from, each a random number up to this; every one costs a forward pass."
        ),
    ] = 0
    # after arXiv:2512.14681, section 3: the share of noise that a token sees before it grows
    schedule: Annotated[
        Schedule,
        Meta(
            description="Length of blocks: n - 1 (constant); from short to n - 1 while training (growing) or over the "
            "blocks of each example (cyclic)."
        ),
    ] = "constant"
    growing_until: Annotated[float, Meta(description="Fraction of the training at which growing blocks are full.")] = (
        0.5
    )

    def __post_init__(self) -> None:
        require(1 <= self.block_length <= MAX_BLOCK_LENGTH, "block_length", self.block_length, f"1..{MAX_BLOCK_LENGTH}")
        require(self.blocks_per_example >= 0, "blocks_per_example", self.blocks_per_example, ">= 0 (0 trains AR alone)")
        if self.blocks_per_example and self.block_length == 1:
            raise ConfigError("block_length=1: has no draft to learn; give >= 2, or blocks_per_example=0")
        require(0 <= self.synthetic_ratio <= 1, "synthetic_ratio", self.synthetic_ratio, "in 0..1")
        require(0 <= self.corrected_ratio <= 1, "corrected_ratio", self.corrected_ratio, "in 0..1")
        require(0 <= self.unroll <= MAX_UNROLL, "unroll", self.unroll, f"0..{MAX_UNROLL}")
        require(0 < self.growing_until <= 1, "growing_until", self.growing_until, "in (0, 1]")


class LossConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is minimised."""

    ar_weight: Annotated[float, Meta(description="Factor of the mean AR loss on answers; keeps the quality.")] = 1.0
    consistency_weight: Annotated[float, Meta(description="Factor of the mean consistency loss on drafts.")] = 1.0
    # as the heads of Medusa are weighted, by 0.8^k (arXiv:2401.10774, section 2.2.1)
    depth_decay: Annotated[
        float,
        Meta(
            description="Weight of a draft token over that of the one before it, from the first wrong one on: a token "
            "counts only where those before it became right, and far ones are hard to foresee."
        ),
    ] = 1.0
    target: Annotated[
        Target,
        Meta(
            description="Drafts learn the distribution at the clean token (soft) or its token (hard); base: drafts and "
            "answers learn the distributions of the model without the adapter, to answer as it does."
        ),
    ] = "soft"
    temperature: Annotated[float, Meta(description="Of targets that are distributions.")] = 1.0

    def __post_init__(self) -> None:
        require(self.ar_weight >= 0, "ar_weight", self.ar_weight, ">= 0")
        require(self.consistency_weight >= 0, "consistency_weight", self.consistency_weight, ">= 0")
        require(self.ar_weight + self.consistency_weight > 0, "ar_weight", self.ar_weight, "> 0 where the other is 0")
        require(0 < self.depth_decay <= 1, "depth_decay", self.depth_decay, "in (0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")


class GatedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Training of a gated adapter: the base answers, the adapter foresees its answers from blocks of noise."""

    gated: Annotated[bool, Meta(description="Train a gated adapter, with which texts stay the base's own.")] = False
    divergence: Annotated[
        Divergence,
        Meta(
            description="What a row minimises: l1, the difference of its distribution and the base's, which is what "
            "acceptance is; kl, their divergence; ce, cross entropy to the base's likeliest token."
        ),
    ] = "l1"


class WeightsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which weights learn."""

    full: Annotated[bool, Meta(description="Train all weights instead of a LoRA adapter.")] = False
    lora_rank: Annotated[int, Meta(description="Rank of a new adapter on every linear layer but the output.")] = 32
    lora_alpha: Annotated[
        int | None, Meta(description="Its scale; left out: twice the rank, 16 times that of a gated adapter.")
    ] = None
    lora_dropout: Annotated[float, Meta(description="Its dropout.")] = 0.0

    def __post_init__(self) -> None:
        require(self.lora_rank >= 1, "lora_rank", self.lora_rank, ">= 1")
        require(self.lora_alpha is None or self.lora_alpha >= 1, "lora_alpha", self.lora_alpha, ">= 1")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long, how fast, and what is reported."""

    epochs: Annotated[float, Meta(description="Passes over the examples.")] = 2.0
    max_steps: Annotated[int | None, Meta(description="Stop after so many optimiser steps, within the epochs.")] = None
    learning_rate: Annotated[float, Meta(description="Peak; a cosine brings it to 0.")] = 5e-4
    warmup_ratio: Annotated[float, Meta(description="Share of the steps in which the rate rises.")] = 0.03
    weight_decay: Annotated[float, Meta(description="Of AdamW.")] = 0.0
    max_grad_norm: Annotated[float, Meta(description="Gradients are clipped to this norm.")] = 1.0
    pack_length: Annotated[int, Meta(description="Tokens of a packed sequence; on a GPU 4096 and more.")] = 1024
    packs_per_step: Annotated[int, Meta(description="Packs per optimiser step and process (accumulation).")] = 8
    max_example_length: Annotated[
        int, Meta(description="Longer examples (prompt and answer, in tokens) are left out, and counted.")
    ] = 1024
    precision: Annotated[Precision, Meta(description="Of the matrix products; auto: bfloat16.")] = "auto"
    device: Annotated[DeviceName, Meta(description="auto: CUDA where there is a GPU, else the CPU.")] = "auto"
    num_threads: Annotated[
        int | None, Meta(description="CPU threads; left out: torch's choice. On a busy machine fewer are faster.")
    ] = None
    gradient_checkpointing: Annotated[bool, Meta(description="Less memory, a third more computation.")] = False
    seed: Annotated[int, Meta(description="Of everything random.")] = 0
    logging_steps: Annotated[int, Meta(description="Optimiser steps between reports.")] = 5
    save_steps: Annotated[int, Meta(description="Optimiser steps between checkpoints to resume from.")] = 50
    resume: Annotated[bool, Meta(description="Go on from the last checkpoint in the output folder.")] = True
    report_to: Annotated[
        str, Meta(description="Also report to wandb, tensorboard or mlflow (installed), comma separated.")
    ] = "none"

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "> 0")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, ">= 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "in [0, 1)")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "> 0")
        require(self.pack_length >= 16, "pack_length", self.pack_length, ">= 16")
        require(self.packs_per_step >= 1, "packs_per_step", self.packs_per_step, ">= 1")
        require(self.max_example_length >= 2, "max_example_length", self.max_example_length, ">= 2")
        require(self.num_threads is None or self.num_threads >= 1, "num_threads", self.num_threads, ">= 1")
        require(self.logging_steps >= 1, "logging_steps", self.logging_steps, ">= 1")
        require(self.save_steps >= 1, "save_steps", self.save_steps, ">= 1")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained, and where the result goes."""

    model: Annotated[
        str | None,
        Meta(description="Hub id, folder or built-in name. Left out: the adapter's base, else SmolLM2-135M-Instruct."),
    ] = None
    adapter: Annotated[
        str | None, Meta(description="LoRA adapter to go on from (the teacher's, say); left out: a new one.")
    ] = None
    output: Annotated[Path, Meta(description="Folder for the adapter (or weights), cllm.json, card and curves.")]
    base_name: Annotated[
        str | None, Meta(description="What the adapter calls its base, where the folder's name would not do.")
    ] = None
    domain: Annotated[str | None, Meta(description='What it is trained for, in a word or two ("text-to-sql").')] = None
    trust_remote_code: Annotated[bool, Meta(description="Let transformers run code of the checkpoint.")] = False


class TeacherConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Knowledge distillation: the distributions of another model are learned in place of the tokens of the answers."""

    teacher: Annotated[
        str | None,
        Meta(description="Hub id, folder or adapter of a model with the same tokenizer, whose distributions to learn."),
    ] = None
    # arXiv:2306.13649, section 3: forward covers all that the teacher may say, reverse keeps to its likeliest
    divergence: Annotated[
        TeacherDivergence,
        Meta(
            description="Which divergence of teacher p and student q: KL(p, q) (forward), KL(q, p) (reverse), or the "
            "mean of both to their mixture (jsd)."
        ),
    ] = "forward"
    temperature: Annotated[float, Meta(description="Of both distributions.")] = 1.0

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        for name in ("divergence", "temperature"):
            value = getattr(self, name)
            if self.teacher is None and value != _default(type(self), name):
                raise ConfigError(f"{name}={value}: is of distillation; give teacher, or leave it out")


class SftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `cllm sft`: fine-tuning on given answers, which makes the teacher, or distillation from one."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    trajectories: Annotated[
        Path | None,
        Meta(
            description="With --teacher: folder written by `cllm trajectories`, whose answers stand in for --data; "
            "those of the student itself make it learn from its own errors."
        ),
    ] = None
    distillation: TeacherConfig = TeacherConfig()
    weights: WeightsConfig = WeightsConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        if self.data.data is None and self.trajectories is None:
            raise ConfigError("data: fine-tuning needs prompts with answers; give --data")
        if self.trajectories is not None:
            if self.distillation.teacher is None:
                raise ConfigError(f"trajectories={self.trajectories}: are answers for a teacher to judge; give teacher")
            _require_no_options(self.data, instead="trajectories")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `cllm train`: consistency training on trajectories, or on answers with made-up noise."""

    model: ModelConfig
    trajectories: Annotated[
        Path | None, Meta(description="Folder written by `cllm trajectories`; left out: answers of --data.")
    ] = None
    data: DataConfig = DataConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    gated: GatedConfig = GatedConfig()
    weights: WeightsConfig = WeightsConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        if (self.trajectories is None) == (self.data.data is None):
            raise ConfigError("trajectories, data: give one of them, recorded states or prompts with answers")
        if self.trajectories is not None:
            _require_no_options(self.data, instead="trajectories")
        if self.noise.consistency == "local" and self.loss.target != "hard":
            raise ConfigError(
                f"target={self.loss.target}: the next state has no distribution at hand; give hard with local "
                "consistency"
            )
        if self.weights.full and self.loss.target == "base":
            raise ConfigError("target=base: with full=True no base is left to learn from; train an adapter")
        if self.gated.gated and self.weights.full:
            raise ConfigError("full=True: a gated adapter stands beside its base; leave out full")
        if self.gated.gated and self.noise.unroll:
            raise ConfigError(
                f"unroll={self.noise.unroll}: blocks of noise are not gone on with; leave it out with gated"
            )
        if self.noise.consistency == "local" and self.noise.unroll:
            raise ConfigError(
                f"unroll={self.noise.unroll}: leads away from the recorded next state; use it with global"
            )


class TrajectoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `cllm trajectories`."""

    model: Annotated[
        str | None, Meta(description="The teacher: Hub id, folder or adapter. Left out: SmolLM2-135M-Instruct.")
    ] = None
    adapter: Annotated[str | None, Meta(description="PEFT adapter to merge into it.")] = None
    output: Annotated[Path, Meta(description="Folder for the shards; a second run goes on where the first stopped.")]
    data: DataConfig = DataConfig()
    self_written: Annotated[
        int, Meta(description="Let the model write so many prompts itself, from its chat template alone.")
    ] = 0
    prompt_temperature: Annotated[float, Meta(description="Of self-written prompts.")] = 1.0
    block_length: Annotated[
        int, Meta(description="Jacobi block length n of the recorded states; 1 records answers alone.")
    ] = DEFAULT_BLOCK_LENGTH
    max_tokens: Annotated[int, Meta(description="Limit of an answer, in tokens.")] = 256
    keep_unfinished: Annotated[bool, Meta(description="Keep answers that did not end within the limit.")] = False
    max_repetition: Annotated[
        float,
        Meta(
            description="Drop answers in which more than this share of 4-grams is a repetition, or a word stands ten "
            "times in a row; 1 keeps them."
        ),
    ] = 0.3
    shard_size: Annotated[int, Meta(description="Trajectories per file.")] = 512
    max_num_seqs: Annotated[int, Meta(description="Prompts decoded together.")] = 16
    device: Annotated[DeviceName, Meta(description="auto: CUDA where there is a GPU, else the CPU.")] = "auto"
    num_threads: Annotated[int | None, Meta(description="CPU threads; left out: torch's choice.")] = None
    seed: Annotated[int, Meta(description="Of self-written prompts.")] = 0
    trust_remote_code: Annotated[bool, Meta(description="Let transformers run code of the checkpoint.")] = False

    def __post_init__(self) -> None:
        if (self.data.data is None) == (self.self_written == 0):
            raise ConfigError("data, self_written: give one of them, prompts or how many the model shall write")
        if self.self_written:
            _require_no_options(self.data, instead="self_written")
        require(self.self_written >= 0, "self_written", self.self_written, ">= 0")
        require(self.prompt_temperature > 0, "prompt_temperature", self.prompt_temperature, "> 0")
        require(1 <= self.block_length <= MAX_BLOCK_LENGTH, "block_length", self.block_length, f"1..{MAX_BLOCK_LENGTH}")
        require(self.max_tokens >= 2, "max_tokens", self.max_tokens, ">= 2")
        require(0 <= self.max_repetition <= 1, "max_repetition", self.max_repetition, "in 0..1")
        require(self.shard_size >= 1, "shard_size", self.shard_size, ">= 1")
        require(self.max_num_seqs >= 1, "max_num_seqs", self.max_num_seqs, ">= 1")
