"""Whole trainings of a tiny model, from settings to a served result."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from cllm_core.errors import ConfigError, DataError, ModelLoadError
from cllm_core.llm import LLM
from cllm_core.models.cllm_json import read_card
from cllm_core.request import SamplingParams
from cllm_core.training.card import TrainingFacts, rewrite_card, write_facts
from cllm_core.training.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    SftConfig,
    TrainConfig,
    TrajectoryConfig,
    WeightsConfig,
)
from cllm_core.training.run import run_sft, run_train
from cllm_core.training.trainer import last_checkpoint
from cllm_core.training.trajectories import record_trajectories
from tests.architectures import Architecture
from tests.conftest import CheckpointFactory
from tests.training.factories import (
    make_run,
    make_sft,
    make_train,
    no_progress,
    read_adapter,
    read_losses,
    write_lines,
    write_questions,
)


def test_fine_tuning_lowers_the_loss_and_the_adapter_serves(tiny_llama: Path, tmp_path: Path) -> None:
    folder = run_sft(make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", epochs=8.0), no_progress)
    losses = read_losses(folder)
    assert losses[-1] < 0.5 * losses[0]
    assert (folder / "losses.png").stat().st_size > 1000
    assert {value.dtype for value in read_adapter(folder).values()} == {torch.bfloat16}
    llm = LLM(str(folder), device="cpu")
    llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(temperature=0, max_tokens=3), progress=False)


def test_consistency_training_lowers_its_loss_and_says_what_it_made(tiny_llama: Path, tmp_path: Path) -> None:
    folder = run_train(make_train(tiny_llama, write_questions(tmp_path), tmp_path / "out", epochs=8.0), no_progress)
    entries = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    drafts = [entry["consistency_loss"] for entry in entries if "loss" in entry]
    assert sum(drafts[-3:]) < sum(drafts[:3])
    card = read_card(folder)
    assert card is not None
    assert (card.block_length, card.domain, card.base) == (5, "test", str(tiny_llama))
    assert "| Jacobi block length | 5 |" in (folder / "README.md").read_text()
    assert json.loads((folder / "training.json").read_text())["num_examples"] == 12


def test_a_new_adapter_answers_as_its_base_does(tiny_llama: Path, tmp_path: Path) -> None:
    """A fresh LoRA adapter changes nothing yet, so its answers have no loss against the base; its drafts do."""
    config = make_train(tiny_llama, write_questions(tmp_path), tmp_path / "out", epochs=8.0, logging_steps=1)
    folder = run_train(msgspec.structs.replace(config, loss=LossConfig(target="base")), no_progress)
    entries = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    reports = [(entry["ar_loss"], entry["consistency_loss"]) for entry in entries if "loss" in entry]
    assert reports[0][0] == pytest.approx(0.0, abs=1e-6)
    assert reports[0][1] > 0.0
    assert max(ar for ar, _ in reports) > 0.0
    assert sum(drafts for _, drafts in reports[-3:]) < sum(drafts for _, drafts in reports[:3])


@pytest.mark.parametrize("run", [run_sft, run_train])
def test_a_step_of_many_packs_is_the_mean_over_its_tokens(
    run: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """Packs counted alike whatever they held, so that the tokens of short ones weighed more."""
    answers = ["the token", "the token " * 9, "a", "the token " * 14, "token " * 3, "of the " * 7]
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": f"Say {i}", "answer": a} for i, a in enumerate(answers)])
    make = make_sft if run is run_sft else make_train
    one, many = (
        run(
            make(tiny_llama, data, tmp_path / str(length), pack_length=length, packs_per_step=8, epochs=1.0),
            no_progress,
        )
        for length in (2048, 64)
    )
    assert json.loads((many / "losses.jsonl").read_text().splitlines()[0])["examples"] == len(answers)
    for name in ("loss", "ar_loss", "consistency_loss"):
        assert read_losses(many, name) == pytest.approx(read_losses(one, name), rel=1e-5)
    for name, value in read_adapter(one).items():
        torch.testing.assert_close(read_adapter(many)[name], value, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("unroll", [0, 2])
def test_resumed_run_follows_the_uninterrupted_curve(
    unroll: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_questions(tmp_path)
    whole = run_train(make_train(tiny_llama, data, tmp_path / "whole", unroll=unroll, save_steps=2), no_progress)
    config = make_train(tiny_llama, data, tmp_path / "parts", unroll=unroll, save_steps=2)
    with monkeypatch.context() as patch:
        interrupt_at_pack(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run_train(config, no_progress)
    parts = run_train(config, no_progress)
    assert len(read_losses(whole)) > 5
    assert read_losses(parts) == pytest.approx(read_losses(whole), rel=1e-5)
    for name, value in read_adapter(whole).items():
        torch.testing.assert_close(read_adapter(parts)[name], value)


def test_recomputed_activations_change_no_loss(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option ended in a TypeError: the Trainer passed more to the model than was accepted."""
    calls = []

    def counted(function: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        calls.append(function)
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    losses = []
    for option in (False, True):
        assert not calls
        config = make_train(
            tiny_llama,
            write_questions(tmp_path),
            tmp_path / str(option),
            unroll=1,
            max_steps=4,
            gradient_checkpointing=option,
        )
        losses.append(read_losses(run_train(config, no_progress)))
    assert calls
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_command_without_torchrun_uses_one_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer put as many packs into a batch as it saw GPUs, which was refused."""
    complete: Callable[[TrainingArguments], None] = TrainingArguments.__post_init__

    def complete_with_two_gpus(self: TrainingArguments) -> None:
        complete(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", complete_with_two_gpus)
    folder = run_sft(make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", max_steps=2), no_progress)
    assert len(read_losses(folder)) == 2


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_gpu_that_is_asked_for_and_missing_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", device="cuda", precision=precision)
    with pytest.raises(ModelLoadError, match="torch sees no CUDA device"):
        run_sft(config, no_progress)


def test_a_checkpoint_left_half_written_is_passed_over(tiny_llama: Path, tmp_path: Path) -> None:
    config = make_train(tiny_llama, write_questions(tmp_path), tmp_path / "out", save_steps=2)
    folder = run_train(config, no_progress)
    losses = read_losses(folder)
    checkpoints = folder / "checkpoints"
    whole = last_checkpoint(folder)
    unfinished = checkpoints / "checkpoint-1000"
    unfinished.mkdir()
    (unfinished / "trained.safetensors").write_bytes(b"")
    assert last_checkpoint(folder) == whole
    assert read_losses(run_train(config, no_progress)) == losses


def interrupt_at_pack(patch: pytest.MonkeyPatch, index: int) -> None:
    from cllm_core.training.dataset import PackDataset  # noqa: PLC0415

    get = PackDataset.__getitem__

    def interrupted(self: PackDataset, i: int) -> dict[str, torch.Tensor]:
        if i == index:
            raise KeyboardInterrupt
        return get(self, i)

    patch.setattr(PackDataset, "__getitem__", interrupted)


def test_trajectories_of_a_teacher_train_its_own_adapter_on(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path)
    teacher = run_sft(make_sft(tiny_llama, data, tmp_path / "teacher", epochs=8.0), no_progress)
    recorded = record_trajectories(
        TrajectoryConfig(
            model=str(teacher),
            output=tmp_path / "trajectories",
            data=DataConfig(data=str(data)),
            block_length=4,
            max_tokens=12,
            keep_unfinished=True,
            max_repetition=1.0,
            device="cpu",
        ),
        no_progress,
    )
    config = TrainConfig(
        model=ModelConfig(model=str(teacher), output=tmp_path / "cllm"),
        trajectories=recorded,
        noise=NoiseConfig(block_length=4),
        run=make_run(learning_rate=1e-6),
    )
    before, after = read_adapter(teacher), read_adapter(run_train(config, no_progress))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_other_architectures_train(
    tiny_checkpoint: CheckpointFactory, architecture: Architecture, tmp_path: Path
) -> None:
    config = make_train(tiny_checkpoint(architecture), write_questions(tmp_path), tmp_path / "out", max_steps=2)
    assert all(math.isfinite(loss) for loss in read_losses(run_train(config, no_progress)))


def test_full_training_writes_weights_that_load(tiny_llama: Path, tmp_path: Path) -> None:
    config = SftConfig(
        model=ModelConfig(model=str(tiny_llama), output=tmp_path / "out"),
        data=DataConfig(data=str(write_questions(tmp_path))),
        weights=WeightsConfig(full=True),
        run=make_run(max_steps=2),
    )
    folder = run_sft(config, no_progress)
    assert LLM(str(folder), device="cpu").info.architecture == "LlamaForCausalLM"
    assert not (folder / "adapter_config.json").exists()


def test_bfloat16_run_keeps_the_adapter_in_float32(tiny_llama: Path, tmp_path: Path) -> None:
    config = make_train(
        tiny_llama, write_questions(tmp_path), tmp_path / "out", max_steps=2, save_steps=1, precision="bfloat16"
    )
    folder = run_train(config, no_progress)
    stored = safetensors.torch.load_file(folder / "checkpoints" / "checkpoint-2" / "trained.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert all("lora" in name for name in stored)


def test_same_seed_gives_the_same_curve(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path)
    folders = [run_train(make_train(tiny_llama, data, tmp_path / str(i), max_steps=3), no_progress) for i in range(2)]
    assert read_losses(folders[0]) == read_losses(folders[1])


def test_other_settings_in_a_used_folder_are_refused_unless_started_anew(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path)
    run_sft(make_sft(tiny_llama, data, tmp_path / "out", max_steps=2, save_steps=1), no_progress)
    with pytest.raises(ConfigError, match=r"other settings \(learning_rate\).*--no-resume"):
        run_sft(make_sft(tiny_llama, data, tmp_path / "out", max_steps=2, learning_rate=0.5), no_progress)
    anew = make_sft(tiny_llama, data, tmp_path / "out", max_steps=2, learning_rate=0.5, resume=False)
    assert len(read_losses(run_sft(anew, no_progress))) == 2


def test_a_run_goes_on_with_as_many_processes_and_the_same_data(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else packs would be left out or taken twice."""
    config = make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", max_steps=2, save_steps=1)
    run_sft(config, no_progress)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"other settings \(num_processes\)"):
        run_sft(config, no_progress)
    monkeypatch.delenv("WORLD_SIZE")
    write_questions(tmp_path, count=11)
    with pytest.raises(ConfigError, match=r"other settings \(examples\)"):
        run_sft(config, no_progress)
    write_questions(tmp_path)
    run_sft(config, no_progress)


def test_a_run_of_an_earlier_version_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    """It noted settings alone."""
    config = make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", max_steps=2, save_steps=1)
    noted = run_sft(config, no_progress) / "checkpoints" / "settings.json"
    settings = json.loads(noted.read_text())
    facts = {name: settings.pop(name) for name in ("num_processes", "examples")}
    noted.write_text(json.dumps(settings))
    run_sft(config, no_progress)
    assert json.loads(noted.read_text()) == settings | facts


def test_adapter_of_another_base_is_refused(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    data = write_questions(tmp_path)
    llama = run_sft(make_sft(tiny_checkpoint("llama"), data, tmp_path / "out", max_steps=1), no_progress)
    model = ModelConfig(model=str(tiny_checkpoint("qwen2-sliding")), adapter=str(llama), output=tmp_path / "other")
    with pytest.raises(ModelLoadError, match="was it trained on another base"):
        run_sft(SftConfig(model=model, data=DataConfig(data=str(data)), run=make_run()), no_progress)


def test_data_that_cannot_be_trained_on_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    unanswered = write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi"}])
    with pytest.raises(DataError, match="record 1 has no answer"):
        run_sft(make_sft(tiny_llama, unanswered, tmp_path / "a"), no_progress)
    with pytest.raises(DataError, match="none of 12 examples fits max_example_length=4"):
        run_sft(make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "b", max_example_length=4), no_progress)
    config = TrainConfig(model=ModelConfig(model=str(tiny_llama), output=tmp_path / "c"), trajectories=tmp_path)
    with pytest.raises(DataError, match=r"has no meta\.json"):
        run_train(config, no_progress)


@pytest.mark.parametrize(("name", "message"), [("nowhere", "'nowhere' is unknown"), ("mlflow", "not installed")])
def test_reporters_that_cannot_be_had_are_refused_before_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        run_sft(make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", report_to=name), no_progress)
    assert not (tmp_path / "out").exists()


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    model = ModelConfig(output=tmp_path)
    with pytest.raises(ConfigError, match="trajectories, data: give one of them"):
        TrainConfig(model=model)
    with pytest.raises(ConfigError, match=r"limit=5: .*with trajectories leave it out"):
        TrainConfig(model=model, trajectories=tmp_path, data=DataConfig(limit=5))
    with pytest.raises(ConfigError, match="target=soft"):
        TrainConfig(model=model, trajectories=tmp_path, noise=NoiseConfig(consistency="local"))
    with pytest.raises(ConfigError, match="target=base: with full=True"):
        TrainConfig(
            model=model,
            trajectories=tmp_path,
            weights=WeightsConfig(full=True),
            loss=LossConfig(target="base"),
        )
    with pytest.raises(ConfigError, match="temperature=0"):
        LossConfig(temperature=0)


def test_the_card_says_that_an_adapter_was_scaled(tiny_llama: Path, tmp_path: Path) -> None:
    folder = run_sft(make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", epochs=1.0), no_progress)
    facts = msgspec.json.decode((folder / "training.json").read_bytes(), type=TrainingFacts)
    assert "multiplied" not in (folder / "README.md").read_text()
    write_facts(folder, msgspec.structs.replace(facts, adapter_scale=0.9))
    assert "| adapter multiplied afterwards by | 0.9 |" in rewrite_card(folder, []).read_text()
