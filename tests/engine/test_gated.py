"""Gated adapters are lossless: whatever they propose, the text is the base's own."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from cllm_core.config import EngineConfig, GatedForm
from cllm_core.engine.build import build_engine
from cllm_core.engine.drafters.base import SeenWindow
from cllm_core.engine.engine import Engine
from cllm_core.engine.ids import Ids
from cllm_core.engine.plan import GatedBlocks
from cllm_core.engine.request_text import RequestText
from cllm_core.request import NewRequest, SamplingParams
from tests.architectures import Architecture
from tests.checkpoints import write_adapter
from tests.conftest import CheckpointFactory
from tests.engine.factories import Answer, Launches, Reader, decode

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS: tuple[GatedForm, ...] = ("noise", "tail", "jacobi", "two_pass")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def gated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random adapter that changes every layer: what it proposes is seldom right."""
    folder = tmp_path_factory.mktemp("gated")
    return str(write_adapter(folder, tiny_llama, r=8, use_rslora=True, target_modules=EVERYWHERE))


@pytest.fixture(scope="module")
def idle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that changes nothing: its rows are the base's own, read from noise or drafts."""
    return str(write_adapter(tmp_path_factory.mktemp("idle"), tiny_llama, std=0.0))


def make_engine(model: Path, **settings: object) -> Engine:
    limits = {"dtype": "float32", "device": "cpu", "num_cache_blocks": 96, "cache_block_size": 4, "block_length": 6}
    return build_engine(EngineConfig(model=str(model), **{**limits, **settings}))  # type: ignore[arg-type]


def requests(seed: int, num: int = 5) -> list[NewRequest]:
    """Greedy and seeded ones, some with penalties, log-probabilities, biases or their own block length."""
    draw = random.Random(seed)
    return [_request(draw, f"{seed}.{index}") for index in range(num)]


def _request(draw: random.Random, request_id: str) -> NewRequest:
    extras: list[dict[str, object]] = [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logprobs": 2},
        {"top_k": 20, "min_tokens": 6},
        {"top_p": 0.9, "logit_bias": {5: 3.0}},
        {"block_length": draw.randint(2, 9)},
        {"prompt_logprobs": 1, "presence_penalty": 0.7},
    ]
    params = SamplingParams(
        temperature=draw.choice([0.0, 0.0, 0.8, 1.3]),
        seed=draw.randrange(2**40),
        max_tokens=draw.randint(6, NUM_TOKENS),
        **draw.choice(extras),  # type: ignore[arg-type]
    )
    prompt = [draw.randrange(40, 250) for _ in range(draw.randint(1, 30))]
    return NewRequest(request_id=request_id, prompt_ids=tuple(prompt), params=params)


def texts(answers: dict[str, Answer]) -> dict[str, tuple[list[int], str | None]]:
    return {name: (answer.token_ids, answer.finish_reason) for name, answer in answers.items()}


def ar_texts(model: Path, asked: Sequence[NewRequest], **settings: object) -> dict[str, tuple[list[int], str | None]]:
    """Each request alone, token by token, on an engine without a gated adapter."""
    engine = make_engine(model, block_length=1, **settings)
    plain = [_with_block_length(request, 1) for request in asked]
    return {request.request_id: texts(decode(engine, [request]))[request.request_id] for request in plain}


def _with_block_length(request: NewRequest, block_length: int) -> NewRequest:
    params = {name: getattr(request.params, name) for name in request.params.__struct_fields__}
    changed = SamplingParams(**{**params, "block_length": block_length})
    return NewRequest(request_id=request.request_id, prompt_ids=request.prompt_ids, params=changed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_text_equals_ar_in_any_form(tiny_llama: Path, gated: str, form: GatedForm, adaptive: bool) -> None:
    asked = requests(seed=1, num=8)
    engine = make_engine(
        tiny_llama, gated_adapter=gated, gated_form=form, gated_rows=4, adaptive_block_length=adaptive, max_num_seqs=4
    )
    launches = Launches(engine)
    assert texts(decode(engine, asked)) == ar_texts(tiny_llama, asked)
    assert any(row.gated is not None for step in launches.steps for row, _ in step.rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_text_equals_ar_under_preemption_and_with_and_without_the_prefix_cache(
    tiny_llama: Path, gated: str, form: GatedForm, seed: int
) -> None:
    asked = requests(seed=10 + seed, num=6)
    engine = make_engine(
        tiny_llama,
        gated_adapter=gated,
        gated_form=form,
        gated_rows=3,
        num_cache_blocks=24,
        max_model_len=60,
        max_batched_tokens=40,
        max_num_seqs=5,
        adaptive_block_length=False,
        prefix_caching=seed % 2 == 0,
    )
    reader, left = Reader(engine), list(asked)
    draw = random.Random(seed)
    while left or engine.has_work():
        if left and draw.random() < 0.4:
            reader.add(left.pop())
        reader.step()
    assert texts(reader.drain()) == ar_texts(tiny_llama, asked, max_model_len=60)


def test_proposals_are_accepted_where_the_adapter_is_right(tiny_llama: Path, idle: str) -> None:
    """Rows that read the very draft, by an adapter that changes nothing, predict what the base predicts."""
    request = NewRequest(
        request_id="a", prompt_ids=tuple(range(40, 60)), params=SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    )
    engine = make_engine(tiny_llama, gated_adapter=idle, gated_form="jacobi", gated_rows=5, adaptive_block_length=False)
    launches = Launches(engine)
    decode(engine, [request])
    used = [step.num_gated for step in launches.steps if step.num_gated]
    assert sum(sum(count.values()) for count in used) > len(launches.steps)


class Proposals:
    """What an engine's gated rows read and propose from now on: (text they see, tokens read, proposals)."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[tuple[list[int], list[int], list[int]]] = []
        source = engine.runner.drafting.gated
        assert source is not None
        self._inputs, self._observe = source.inputs, source.observe
        self._pending: dict[int, tuple[RequestText, GatedBlocks, list[int], list[int]]] = {}
        source.inputs = self._note_inputs  # type: ignore[method-assign]
        source.observe = self._note_window  # type: ignore[method-assign]

    def _note_inputs(self, blocks: GatedBlocks, text: RequestText, text_end: int) -> Ids:
        ids = self._inputs(blocks, text, text_end)
        known = text.tokens(0, text_end + max(blocks.lengths)).tolist()
        self._pending[id(text)] = text, blocks, known, ids.tolist()
        return ids

    def _note_window(self, window: SeenWindow) -> None:
        if window.gated is not None:
            _, blocks, known, ids = self._pending.pop(id(window.text))
            for number, length in enumerate(blocks.lengths):
                own = slice(number * blocks.size, (number + 1) * blocks.size)
                self.seen.append((known[: window.text_end + length], ids[own], list(window.gated_ids[own])))
        self._observe(window)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_proposals_are_those_of_a_plain_draft_pass_of_transformers_and_peft(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, form: GatedForm, architecture: Architecture
) -> None:
    """Uno's first pass: the base's keys and values of the text, then the adapter's rows behind it, greedily."""
    base = tiny_checkpoint(architecture)
    adapter = write_adapter(tmp_path, base, r=8, target_modules=EVERYWHERE)
    engine = make_engine(
        base, gated_adapter=str(adapter), gated_form=form, gated_rows=3, adaptive_block_length=False, dtype="float32"
    )
    proposals = Proposals(engine)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = (tuple(range(40, 60)), tuple(range(90, 97)))
    decode(engine, [NewRequest(request_id=str(prompt[0]), prompt_ids=prompt, params=params) for prompt in prompts])
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()
    assert len(proposals.seen) >= 8
    for text, read, proposed in proposals.seen:
        assert draft_pass(tuned, text, read) == proposed


@torch.no_grad()
def draft_pass(tuned: peft.PeftModel, text: list[int], read: list[int]) -> list[int]:
    cache = DynamicCache()
    with tuned.disable_adapter():
        tuned(input_ids=torch.tensor([text]), past_key_values=cache)
    logits = tuned(input_ids=torch.tensor([read]), past_key_values=cache).logits[0]
    found: list[int] = logits.argmax(-1).tolist()
    return found


def test_a_request_can_do_without(tiny_llama: Path, gated: str) -> None:
    engine = make_engine(tiny_llama, gated_adapter=gated, adaptive_block_length=False)
    launches = Launches(engine)
    params = [SamplingParams(temperature=0, max_tokens=8, gated=False), SamplingParams(max_tokens=8, block_length=1)]
    decode(engine, [NewRequest(request_id=str(i), prompt_ids=(40, 41), params=one) for i, one in enumerate(params)])
    assert all(row.gated is None for step in launches.steps for row, _ in step.rows)


def test_requests_of_other_adapters_run_beside_it(tiny_llama: Path, gated: str, tmp_path: Path) -> None:
    other = str(write_adapter(tmp_path, tiny_llama, seed=5))
    asked = [
        NewRequest(
            request_id=f"{name}{request.request_id}", prompt_ids=request.prompt_ids, params=request.params, adapter=name
        )
        for name in ("", "other")
        for request in requests(seed=3, num=3)
    ]
    both = make_engine(tiny_llama, gated_adapter=gated, gated_rows=3, adapters={"other": other})
    plain = make_engine(tiny_llama, adapters={"other": other})
    launches = Launches(both)
    assert texts(decode(both, asked)) == texts(decode(plain, asked))
    rows = [(row.adapter_id, row.gated is not None) for step in launches.steps for row, _ in step.rows]
    assert {adapter_id for adapter_id, has_blocks in rows if has_blocks} == {0}


def test_an_adapter_in_the_models_folder_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    """As Uno publishes them: the base at the root, the adapter in `adapter/`."""
    folder = tmp_path / "uno"
    shutil.copytree(tiny_llama, folder)
    write_adapter(folder / "adapter", tiny_llama, r=8)
    info = make_engine(folder).info
    assert info.gated is not None
    assert (info.gated.rank, info.gated.form) == (8, "noise")
    assert make_engine(folder, gated_adapter="none").info.gated is None


def test_noise_is_drawn_from_ordinary_tokens(tiny_llama: Path, gated: str) -> None:
    engine = make_engine(tiny_llama, gated_adapter=gated, adaptive_block_length=False)
    special = [token["id"] for token in json.loads(engine.info.tokenizer.tokenizer_json)["added_tokens"]]
    proposals = Proposals(engine)
    decode(engine, requests(seed=4, num=2))
    read = {token_id for _, ids, _ in proposals.seen for token_id in ids}
    assert len(read) > 50
    assert read.isdisjoint(special)
    assert max(read) < engine.info.vocab_size
