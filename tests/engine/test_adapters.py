"""Adapters beside one base: a mixed batch gives token for token what each merged model gives alone."""

from pathlib import Path

import pytest

from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.engine.engine import Engine
from cllm_core.request import NewRequest, SamplingParams
from tests.architectures import Architecture
from tests.checkpoints import write_adapter
from tests.conftest import CheckpointFactory
from tests.engine.factories import Answer, decode

NUM_TOKENS = 24
PROMPTS = ((40, 50, 60, 70, 80), tuple(range(100, 130)))
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_engine(model: Path, **settings: object) -> Engine:
    limits = {"dtype": "float32", "device": "cpu", "num_cache_blocks": 64, "cache_block_size": 4}
    return build_engine(EngineConfig(model=str(model), **{**limits, **settings}))  # type: ignore[arg-type]


def ask(adapter: str, prompt: tuple[int, ...], **params: object) -> NewRequest:
    sampling = SamplingParams(temperature=0, **{"max_tokens": NUM_TOKENS, **params})  # type: ignore[arg-type]
    return NewRequest(request_id=f"{adapter} {prompt[0]}", prompt_ids=prompt, params=sampling, adapter=adapter)


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in answers.items()}


@pytest.fixture
def adapters(tiny_llama: Path, tmp_path: Path) -> dict[str, str]:
    """Two adapters of the tiny Llama: of other ranks, on other layers."""
    wide = write_adapter(tmp_path / "sql", tiny_llama, r=8, use_rslora=True, target_modules=EVERYWHERE)
    return {"sql": str(wide), "chat": str(write_adapter(tmp_path / "chat", tiny_llama, seed=2))}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("block_length", [1, 8])
def test_mixed_batch_equals_each_merged_model_alone(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, architecture: Architecture, block_length: int
) -> None:
    base = tiny_checkpoint(architecture)
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}
    sql = write_adapter(tmp_path / "sql", base, r=8, use_rslora=True, target_modules=EVERYWHERE, **patterns)
    chat = write_adapter(tmp_path / "chat", base, seed=2)
    mixed = make_engine(base, adapters={"sql": str(sql), "chat": str(chat)}, block_length=block_length)
    together = tokens(decode(mixed, [ask(name, prompt) for prompt in PROMPTS for name in ("", "sql", "chat")]))
    alone = {
        name: tokens(decode(make_engine(path), [ask("", prompt) for prompt in PROMPTS]))
        for name, path in (("", base), ("sql", sql), ("chat", chat))
    }
    for prompt in PROMPTS:
        answers = {name: together[f"{name} {prompt[0]}"] for name in alone}
        assert answers == {name: texts[f" {prompt[0]}"] for name, texts in alone.items()}
        assert len({tuple(answer) for answer in answers.values()}) == 3
