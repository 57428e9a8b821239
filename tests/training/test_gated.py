"""Gated adapters: the pack of texts and noise against a plain pass over every block."""

import random
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cllm_core.errors import ConfigError
from cllm_core.training.config import GatedConfig, NoiseConfig, WeightsConfig
from cllm_core.training.examples import NoisyBlock, Trajectory
from cllm_core.training.gated import GatedModel, noise_blocks
from cllm_core.training.losses import divergence_losses
from cllm_core.training.packing import PackedExample, build_layout
from cllm_core.training.run import run_train
from tests.architectures import Architecture
from tests.checkpoints import VOCAB_SIZE
from tests.training.factories import make_model, make_train, random_ids, read_losses, write_questions

NOISE_IDS = range(3, VOCAB_SIZE)


def make_examples(num_examples: int = 3) -> list[PackedExample]:
    """Examples that share a prefix, with blocks of noise."""
    rng = random.Random(0)
    noise = NoiseConfig(block_length=4, blocks_per_example=3)
    shared = random_ids(rng, 6)
    examples = []
    for index in range(num_examples):
        trajectory = Trajectory(shared + random_ids(rng, 2 + index), random_ids(rng, 8 + index))
        blocks = noise_blocks(trajectory, noise, NOISE_IDS, rng)
        examples.append(PackedExample(trajectory.prompt_ids, trajectory.output_ids, blocks))
    return examples


def with_adapter(architecture: Architecture, *, packed: bool) -> tuple[PreTrainedModel, peft.PeftModel]:
    """The same model and adapter, whether it takes packs or plain sequences."""
    model = make_model(architecture, packed=packed)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, adapted


def plain_losses(architecture: Architecture, examples: list[PackedExample]) -> tuple[Tensor, dict[str, Tensor]]:
    """[rows] L1 of each block by a pass of its own behind the cached text, and the gradients of their mean."""
    model, adapted = with_adapter(architecture, packed=False)
    losses = []
    for example in examples:
        text = torch.tensor([example.prompt_ids + example.output_ids])
        with torch.no_grad(), adapted.disable_adapter():
            wanted = model(text).logits[0]
        for block in example.blocks:
            cache = DynamicCache()
            begin = len(example.prompt_ids) + block.start
            with torch.no_grad(), adapted.disable_adapter():
                model(text[:, :begin], past_key_values=cache, use_cache=True)
            logits = model(torch.tensor([block.draft_ids]), past_key_values=cache, use_cache=True).logits[0]
            probabilities = torch.softmax(wanted[begin : begin + len(block.draft_ids)], dim=-1)
            losses.append((torch.softmax(logits, dim=-1) - probabilities).abs().sum(dim=-1))
    per_row = torch.cat(losses)
    per_row.mean().backward()
    return per_row.detach(), gradients(adapted)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_losses_and_gradients_are_those_of_every_block_alone(architecture: Architecture) -> None:
    examples = make_examples()
    expected, wanted = plain_losses(architecture, examples)
    model, adapted = with_adapter(architecture, packed=True)
    gated = GatedModel(model, base=adapted.disable_adapter, depth_decay=1.0, divergence="l1", chunk_rows=7)
    out = gated(**build_layout([examples]).as_dict())
    assert out["num_consistency"] == len(expected)
    torch.testing.assert_close(out["loss"], expected.mean())
    torch.testing.assert_close(out["consistency_loss"], expected.mean())
    out["loss"].backward()
    found = gradients(adapted)
    assert found.keys() == wanted.keys()
    assert len(found) == 16
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def test_rows_count_less_with_their_depth() -> None:
    examples = make_examples()
    model, adapted = with_adapter("llama", packed=True)
    pack = build_layout([examples]).as_dict()
    even = GatedModel(model, base=adapted.disable_adapter, depth_decay=1.0, divergence="l1")
    falling = GatedModel(model, base=adapted.disable_adapter, depth_decay=0.5, divergence="l1")
    rows = sum(len(block.draft_ids) for example in examples for block in example.blocks)
    depths = [depth for example in examples for block in example.blocks for depth in range(len(block.draft_ids))]
    assert even.weight_totals(pack).tolist() == [0, rows]
    assert falling.weight_totals(pack)[1] == pytest.approx(sum(0.5**depth for depth in depths))
    assert falling(**pack)["loss"] != even(**pack)["loss"]


def test_an_example_without_blocks_has_no_loss() -> None:
    first, second, _ = make_examples()
    alone = PackedExample(second.prompt_ids, second.output_ids)
    model, adapted = with_adapter("llama", packed=True)
    gated = GatedModel(model, base=adapted.disable_adapter, depth_decay=1.0, divergence="kl")
    both = gated(**build_layout([[first], [alone]]).as_dict())
    torch.testing.assert_close(both["loss"], gated(**build_layout([[first]]).as_dict())["loss"])
    nothing = gated(**build_layout([[alone]]).as_dict())
    assert nothing["loss"] == 0
    nothing["loss"].backward()


def test_blocks_are_noise_with_what_the_answer_has_at_their_places() -> None:
    trajectory = Trajectory((5, 6), tuple(range(100, 120)))
    noise = NoiseConfig(block_length=5, blocks_per_example=6)
    blocks = noise_blocks(trajectory, noise, range(7, 9), random.Random(2))
    starts = [block.start for block in blocks]
    assert starts == sorted(set(starts))
    for block in blocks:
        assert set(block.draft_ids) <= {7, 8}
        assert block.target_ids == trajectory.output_ids[block.start + 1 : block.start + 5]
        assert len(block.draft_ids) == len(block.target_ids) == min(4, 19 - block.start)
    assert noise_blocks(Trajectory((5,), (6,)), noise, range(7, 9), random.Random(2)) == ()
    every = noise_blocks(trajectory, NoiseConfig(block_length=3, blocks_per_example=99), range(7, 9), random.Random(2))
    assert [block.start for block in every] == list(range(19))


@pytest.mark.parametrize("divergence", ["l1", "kl", "ce"])
def test_a_proposal_like_the_base_has_the_least_loss(divergence: str) -> None:
    base = torch.tensor([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0]])
    other = torch.tensor([[0.0, 8.0, 0.0], [8.0, 0.0, 0.0]])
    same, wrong = (divergence_losses(logits, base_logits=base, divergence=divergence) for logits in (base, other))
    assert same.shape == (2,)
    assert (same < 0.01).all()
    assert (wrong > 1.9).all()


def test_training_a_gated_adapter_lowers_its_loss_and_leaves_the_base_alone(tiny_llama: Path, tmp_path: Path) -> None:
    config = make_train(tiny_llama, write_questions(tmp_path), tmp_path / "out", epochs=6.0)
    gated = type(config)(
        model=config.model,
        data=config.data,
        run=config.run,
        noise=NoiseConfig(block_length=4, blocks_per_example=4),
        gated=GatedConfig(gated=True),
    )
    folder = run_train(gated, lambda stage, fraction: None)
    losses = read_losses(folder, "consistency_loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert (folder / "adapter_model.safetensors").exists()


def test_what_makes_no_sense_with_a_gate_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = make_train(tiny_llama, tmp_path / "x.jsonl", tmp_path / "out")
    for settings, message in (
        ({"weights": WeightsConfig(full=True)}, "full=True"),
        ({"noise": NoiseConfig(unroll=1)}, "unroll=1"),
    ):
        with pytest.raises(ConfigError, match=message):
            type(config)(model=config.model, data=config.data, gated=GatedConfig(gated=True), **settings)


def test_a_block_has_a_target_for_each_token() -> None:
    assert all(isinstance(block, NoisyBlock) for example in make_examples() for block in example.blocks)
