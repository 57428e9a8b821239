"""Packed losses equal unpacked ones, and packs hold what they should."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.text.prefixes import shared_prefix_length
from cllm_core.training.examples import NoisyBlock
from cllm_core.training.losses import distribution_losses, token_losses
from cllm_core.training.model import PackedModel
from cllm_core.training.packing import (
    ExampleSize,
    PackedExample,
    build_layout,
    find_families,
    plan_packs,
    visible,
    without_blocks,
)
from cllm_core.training.trainable import recompute_activations
from tests.architectures import Architecture
from tests.training.factories import make_group, make_model, random_ids

ARCHITECTURES: list[Architecture] = ["llama", "qwen2", "qwen3", "mistral", "qwen2-sliding"]


def unpacked_losses(model: PreTrainedModel, examples: Sequence[PackedExample], *, soft: bool) -> tuple[Tensor, Tensor]:
    """Mean AR and consistency loss, every example and every block in a sequence of its own."""
    clean, noisy = [], []
    for example in examples:
        answer = torch.tensor(example.output_ids)
        first = len(example.prompt_ids) - 1
        logits = model(input_ids=torch.tensor([example.prompt_ids + example.output_ids])).logits[0, first:-1]
        clean.append(token_losses(logits, answer))
        for block in example.blocks:
            text = example.prompt_ids + example.output_ids[: block.start] + block.draft_ids
            found = model(input_ids=torch.tensor([text])).logits[0, -len(block.draft_ids) :]
            teacher = logits[block.start + 1 : block.start + 1 + len(block.draft_ids)]
            noisy.append(
                distribution_losses(found, teacher) if soft else token_losses(found, torch.tensor(block.target_ids))
            )
    return torch.cat(clean).mean(), torch.cat(noisy).mean()


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_losses_and_gradients_equal_unpacked_ones(architecture: Architecture, soft: bool) -> None:
    groups = [make_group(seed=1, prefix=30), make_group(seed=2, prefix=0), make_group(seed=3, num_examples=1)]
    model, reference = make_model(architecture), make_model(architecture, packed=False)
    packed = PackedModel(model, ar_weight=0.7, consistency_weight=1.3, soft=soft, chunk_rows=16)
    found = packed(**build_layout(groups).as_dict())
    ar_loss, consistency_loss = unpacked_losses(reference, [e for group in groups for e in group], soft=soft)
    torch.testing.assert_close(found["ar_loss"], ar_loss.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["consistency_loss"], consistency_loss.detach(), rtol=1e-4, atol=1e-5)
    found["loss"].backward()
    (0.7 * ar_loss + 1.3 * consistency_loss).backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_targets_of_the_base_reach_clean_and_draft_tokens() -> None:
    groups = [make_group(seed=1), make_group(seed=2, prefix=0)]
    model, base = make_model(), make_model(packed=False)
    with torch.no_grad():
        base.get_decoder().layers[0].mlp.up_proj.weight.mul_(1.5)
    clean, noisy = [], []
    for example in (example for group in groups for example in group):
        first = len(example.prompt_ids) - 1
        text = torch.tensor([example.prompt_ids + example.output_ids[:-1]])
        targets = base(input_ids=text).logits[0, first:]
        clean.append(distribution_losses(model_logits(text)[first:], targets))
        for block in example.blocks:
            draft = torch.tensor([example.prompt_ids + example.output_ids[: block.start] + block.draft_ids])
            found = model_logits(draft)[-len(block.draft_ids) :]
            noisy.append(distribution_losses(found, targets[block.start + 1 :][: len(block.draft_ids)]))

    @contextmanager
    def as_base() -> Iterator[None]:
        own = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(base.state_dict())
        yield
        model.load_state_dict(own)

    found = PackedModel(model, base=as_base, chunk_rows=16)(**build_layout(groups).as_dict())
    torch.testing.assert_close(found["ar_loss"], torch.cat(clean).mean().detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["consistency_loss"], torch.cat(noisy).mean().detach(), rtol=1e-4, atol=1e-6)


def test_a_pack_without_blocks_is_that_of_its_clean_examples() -> None:
    groups = [make_group(seed=1), make_group(seed=2, prefix=0)]
    found = without_blocks(build_layout(groups))
    expected = build_layout([[replace(example, blocks=()) for example in group] for group in groups])
    for name in (
        "input_ids",
        "position_ids",
        "starts",
        "row_index",
        "target_ids",
        "teacher_rows",
        "chunk_ends",
        "spans",
    ):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    everything = torch.arange(len(expected.input_ids))
    assert torch.equal(visible(found, everything, everything), visible(expected, everything, everything))


def test_deeper_draft_tokens_count_less_by_the_decay() -> None:
    example = PackedExample((1, 2, 3), (10, 11, 12, 13, 14, 15), (NoisyBlock(1, (90, 12, 91), (12, 13, 14)),))
    pack = build_layout([[example]]).as_dict()
    model = make_model()
    text = torch.tensor([(1, 2, 3, 10, 90, 12, 91)])
    expected = token_losses(model_logits(text)[-3:], torch.tensor([12, 13, 14]))
    found = PackedModel(model, ar_weight=0.0, depth_decay=0.5, soft=False)(**pack)
    torch.testing.assert_close(found["loss"], (expected * torch.tensor([4, 2, 1])).sum() / 7, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["consistency_loss"], expected.mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def model_logits(text: Tensor) -> Tensor:
    """[T, V] of the model of `make_model`, not packed; text [1, T]."""
    logits: Tensor = make_model(packed=False)(input_ids=text).logits[0]
    return logits


def test_fused_attention_equals_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run here."""
    layout = build_layout([make_group(seed=1), make_group(seed=2, prefix=0)])
    packed = PackedModel(make_model("mistral"))
    plain = packed(**layout.as_dict())["loss"]
    monkeypatch.setattr("cllm_core.training.attention._uses_fused_kernel", lambda device: True)
    torch.testing.assert_close(packed(**layout.as_dict())["loss"], plain, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    layout = build_layout([make_group()])
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            recompute_activations(model)
        packed = PackedModel(model).train()
        packed(**layout.as_dict())["loss"].backward()
        gradients.append(model.get_decoder().layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_chunks_change_no_loss() -> None:
    layout = build_layout([make_group()]).as_dict()
    model = make_model()
    losses = [PackedModel(model, chunk_rows=rows)(**layout)["loss"].item() for rows in (1, 30, 10_000)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_shared_prefix_is_stored_once_and_positions_are_those_of_each_example() -> None:
    group = make_group(prefix=9, num_examples=2)
    layout = build_layout([group])
    own = sum(
        len(example.prompt_ids) - 9 + len(example.output_ids) - 1 + sum(len(b.draft_ids) for b in example.blocks)
        for example in group
    )
    assert len(layout.input_ids) == 9 + own
    assert layout.position_ids[:9].tolist() == list(range(9))
    assert (layout.position_ids == 9).sum() >= 2


def test_last_prompt_token_is_never_shared() -> None:
    assert shared_prefix_length([(1, 2, 3), (1, 2, 3)]) == 2
    assert shared_prefix_length([(1, 2), (1, 2, 3)]) == 1
    assert shared_prefix_length([(5, 2), (1, 2, 3)]) == 0


def test_prompts_that_begin_alike_form_a_family() -> None:
    rng = random.Random(0)
    schemas = [random_ids(rng, 20) for _ in range(3)]
    prompts = [schemas[i % 3] + random_ids(rng, 5) for i in range(12)]
    families = find_families(prompts)
    assert sorted(sorted(family) for family in families) == [[i, i + 3, i + 6, i + 9] for i in range(3)]


@pytest.mark.parametrize("pack_length", [40, 120, 1000])
def test_every_example_is_packed_once_and_packs_keep_the_limit(pack_length: int) -> None:
    rng = random.Random(0)
    schemas = [random_ids(rng, 15) for _ in range(5)]
    sizes = [ExampleSize(schemas[i % 5] + random_ids(rng, 3), rng.randrange(5, 20)) for i in range(60)]
    plans = plan_packs(sizes, find_families([s.prompt_ids for s in sizes]), pack_length=pack_length, seed=1)
    assert sorted(i for plan in plans for group in plan for i in group) == list(range(60))
    for plan in plans:
        groups = [[PackedExample(sizes[i].prompt_ids, (7,) * (sizes[i].num_other + 1)) for i in g] for g in plan]
        assert len(build_layout(groups).input_ids) <= pack_length


def test_sharing_saves_tokens() -> None:
    group = make_group(prefix=50, num_examples=8)
    alone = sum(len(build_layout([[example]]).input_ids) for example in group)
    assert len(build_layout([group]).input_ids) == alone - 7 * 50
