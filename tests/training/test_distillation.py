"""Distillation: divergences by the textbook, packs against plain passes, whole runs."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.errors import ConfigError
from cllm_core.training.config import DataConfig, ModelConfig, SftConfig, TeacherConfig, TrajectoryConfig
from cllm_core.training.distillation import DistilledModel
from cllm_core.training.losses import divergence_losses
from cllm_core.training.packing import PackedExample, build_layout
from cllm_core.training.run import run_sft
from cllm_core.training.trajectories import record_trajectories
from tests.architectures import Architecture
from tests.checkpoints import write_checkpoint
from tests.conftest import CheckpointFactory
from tests.training.factories import make_group, make_model, make_run, no_progress, read_losses, write_questions
from tests.training.test_run import interrupt_at_pack

DIVERGENCES = ["forward", "reverse", "jsd"]


def textbook(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """[R] of logits [R, V]: sums of p log(p / q), in probabilities."""

    def divergence_to(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(dim=-1)

    q, p = torch.softmax(student, dim=-1), torch.softmax(teacher, dim=-1)
    match divergence:
        case "forward":
            return divergence_to(p, q)
        case "reverse":
            return divergence_to(q, p)
    m = (p + q) / 2
    return (divergence_to(p, m) + divergence_to(q, m)) / 2


def answers() -> list[PackedExample]:
    return [PackedExample(example.prompt_ids, example.output_ids) for example in make_group()]


def plain_losses(student: PreTrainedModel, teacher: PreTrainedModel, divergence: str) -> Tensor:
    """[rows] by a pass of every text alone."""
    losses = []
    for example in answers():
        text = torch.tensor([example.prompt_ids + example.output_ids])
        rows = slice(len(example.prompt_ids) - 1, -1)
        with torch.no_grad():
            wanted = teacher(text).logits[0, rows]
        losses.append(textbook(student(text).logits[0, rows], wanted, divergence))
    return torch.cat(losses)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_gradients_are_the_textbook_ones(divergence: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float32).requires_grad_()
    teacher = torch.randn(4, 7, generator=generator).requires_grad_()
    found = divergence_losses(logits, base_logits=teacher, divergence=divergence, temperature=temperature)
    expected = temperature**2 * textbook(logits / temperature, teacher.detach() / temperature, divergence)
    torch.testing.assert_close(found, expected)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    found.sum().backward()
    torch.testing.assert_close(logits.grad, wanted)
    assert teacher.grad is None


def test_jsd_is_bounded_where_the_others_are_not() -> None:
    apart = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]])
    forward, reverse, jsd = (divergence_losses(apart[0], base_logits=apart[1], divergence=d) for d in DIVERGENCES)
    assert jsd.item() == pytest.approx(math.log(2))
    assert min(forward.item(), reverse.item()) > 50


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_losses_and_gradients_are_those_of_every_text_alone(architecture: Architecture, divergence: str) -> None:
    """The teacher is of another architecture: only the tokenizer is shared."""
    plain = make_model(architecture, packed=False)
    expected = plain_losses(plain, make_model("mistral", packed=False), divergence)
    expected.mean().backward()
    student = make_model(architecture)
    teacher = make_model("mistral").requires_grad_(False)
    model = DistilledModel(student, teacher, divergence=divergence, chunk_rows=7)
    out = model(**build_layout([answers()]).as_dict())
    assert out["num_ar"] == len(expected)
    torch.testing.assert_close(out["loss"], expected.mean())
    torch.testing.assert_close(out["ar_loss"], expected.detach().mean())
    out["loss"].backward()
    for (name, found), wanted in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=name, rtol=1e-3, atol=1e-5)


def test_the_teacher_is_no_part_of_the_model() -> None:
    model = DistilledModel(make_model("llama"), make_model("qwen3").requires_grad_(False), divergence="forward")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(list(model.parameters())) == len(list(make_model("llama").parameters()))


def test_vocabularies_padded_differently_are_compared_where_both_have_tokens() -> None:
    student, teacher = make_model("llama"), make_model("mistral")
    packs = build_layout([answers()]).as_dict()
    alike = DistilledModel(student, teacher, divergence="reverse")(**packs)["loss"]
    teacher.resize_token_embeddings(400, mean_resizing=False)
    torch.testing.assert_close(DistilledModel(student, teacher, divergence="reverse")(**packs)["loss"], alike)


def make_distillation(student: Path, teacher: Path, output: Path, data: Path, **changes: object) -> SftConfig:
    return SftConfig(
        model=ModelConfig(model=str(student), output=output),
        data=DataConfig(data=str(data)),
        distillation=TeacherConfig(teacher=str(teacher), divergence="jsd"),
        run=make_run(**changes),
    )


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher_and_a_resumed_run_alike(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, data = tiny_checkpoint("llama"), tiny_checkpoint("qwen3"), write_questions(tmp_path)
    whole = run_sft(make_distillation(student, teacher, tmp_path / "whole", data, max_steps=6), no_progress)
    config = make_distillation(student, teacher, tmp_path / "parts", data, max_steps=6, save_steps=2)
    with monkeypatch.context() as patch:
        interrupt_at_pack(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run_sft(config, no_progress)
    losses = read_losses(whole)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert read_losses(run_sft(config, no_progress)) == pytest.approx(losses, rel=1e-5)


def test_a_teacher_that_is_the_student_has_nothing_to_teach(tiny_llama: Path, tmp_path: Path) -> None:
    config = make_distillation(tiny_llama, tiny_llama, tmp_path / "out", write_questions(tmp_path), max_steps=1)
    assert read_losses(run_sft(config, no_progress)) == pytest.approx([0.0], abs=1e-6)


@pytest.mark.slow
def test_the_student_learns_from_what_it_wrote_itself(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    student = tiny_checkpoint("llama")
    written = record_trajectories(
        TrajectoryConfig(
            model=str(student),
            output=tmp_path / "written",
            data=DataConfig(data=str(write_questions(tmp_path))),
            block_length=1,
            max_tokens=12,
            keep_unfinished=True,
            max_repetition=1.0,
            device="cpu",
        ),
        no_progress,
    )
    config = SftConfig(
        model=ModelConfig(model=str(student), output=tmp_path / "out"),
        trajectories=written,
        distillation=TeacherConfig(teacher=str(tiny_checkpoint("qwen3")), divergence="reverse"),
        run=make_run(max_steps=5),
    )
    losses = read_losses(run_sft(config, no_progress))
    assert losses[-1] < losses[0]


def test_a_teacher_with_another_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "llama")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens(["brand-new"])
    tokenizer.save(str(other / "tokenizer.json"))
    with pytest.raises(ConfigError, match="its tokenizer is not that of"):
        run_sft(make_distillation(tiny_llama, other, tmp_path / "out", write_questions(tmp_path)), no_progress)


def test_options_of_distillation_without_a_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divergence=jsd: is of distillation; give teacher"):
        TeacherConfig(divergence="jsd")
    with pytest.raises(ConfigError, match="answers for a teacher to judge"):
        SftConfig(model=ModelConfig(output=tmp_path), trajectories=tmp_path)
