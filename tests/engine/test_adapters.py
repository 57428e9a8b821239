"""Adapters beside one base: a mixed batch gives token for token what each merged model gives alone."""

from pathlib import Path

import pytest

from cllm_core.config import EngineConfig
from cllm_core.engine import build
from cllm_core.engine.build import build_engine
from cllm_core.engine.engine import Engine
from cllm_core.errors import ConfigError, InvalidRequest, ModelLoadError
from cllm_core.models.cllm_json import CllmCard, write_card
from cllm_core.request import NewRequest, SamplingParams
from tests.architectures import Architecture
from tests.checkpoints import write_adapter
from tests.conftest import CheckpointFactory
from tests.engine.factories import Answer, Reader, decode, decode_one

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
    patterns: dict[str, object] = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}
    lora: dict[str, object] = {"r": 8, "use_rslora": True, "target_modules": EVERYWHERE, **patterns}
    sql = write_adapter(tmp_path / "sql", base, base=None, seed=1, **lora)
    chat = write_adapter(tmp_path / "chat", base, seed=2)
    mixed = make_engine(base, adapters={"sql": str(sql), "chat": str(chat)}, block_length=block_length)
    mixed.runs_ahead = True
    together = tokens(decode(mixed, [ask(name, prompt) for prompt in PROMPTS for name in ("", "sql", "chat")]))
    alone = {
        name: tokens(decode(make_engine(path), [ask("", prompt) for prompt in PROMPTS]))
        for name, path in (("", base), ("sql", sql), ("chat", chat))
    }
    for prompt in PROMPTS:
        answers = {name: together[f"{name} {prompt[0]}"] for name in alone}
        assert answers == {name: texts[f" {prompt[0]}"] for name, texts in alone.items()}
        assert len({tuple(answer) for answer in answers.values()}) == 3


def test_prefixes_are_shared_by_requests_of_one_adapter_only(tiny_llama: Path, adapters: dict[str, str]) -> None:
    engine = make_engine(tiny_llama, adapters=adapters)
    prompt = tuple(range(50, 90))
    cached = {}
    for round_number in (1, 2):
        for name in ("", "sql", "chat"):
            answer = decode_one(engine, ask(name, prompt))
            cached[round_number, name] = answer.stats.num_cached_tokens
    assert [cached[1, name] for name in ("", "sql", "chat")] == [0, 0, 0]
    assert [cached[2, name] for name in ("", "sql", "chat")] == [36, 36, 36]


def test_other_weights_under_an_old_name_do_not_find_its_prefixes(
    tiny_llama: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    engine = make_engine(tiny_llama, adapters={"sql": adapters["sql"]}, adapter_root=str(tmp_path))
    request = ask("sql", tuple(range(50, 90)))
    before = decode_one(engine, request)
    engine.unload_adapter("sql")
    engine.load_adapter("sql", "chat")
    assert decode_one(engine, request).token_ids != before.token_ids
    engine.unload_adapter("sql")
    engine.load_adapter("sql", "sql")
    again = decode_one(engine, request)
    assert (again.token_ids, again.stats.num_cached_tokens) == (before.token_ids, 36)


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_requests_that_run_finish_with_an_adapter_that_is_unloaded(
    tiny_llama: Path, adapters: dict[str, str], tmp_path: Path, runs_ahead: bool
) -> None:
    engine = make_engine(tiny_llama, adapters=adapters, adapter_root=str(tmp_path), max_adapters=2, block_length=1)
    engine.runs_ahead = runs_ahead
    request = ask("sql", PROMPTS[0])
    expected = decode_one(engine, request).token_ids
    reader = Reader(engine)
    reader.add(request)
    for _ in range(3):
        reader.step()
    engine.unload_adapter("sql")
    assert [adapter.name for adapter in engine.info.adapters] == ["chat"]
    with pytest.raises(InvalidRequest, match="adapter 'sql' is not loaded; loaded are: chat"):
        engine.add_request(ask("sql", PROMPTS[1]))
    with pytest.raises(ModelLoadError, match="2 adapters are held and max_adapters allows no more"):
        engine.load_adapter("third", "sql")
    assert reader.drain()[request.request_id].token_ids == expected
    engine.load_adapter("third", "sql")
    assert decode_one(engine, ask("third", PROMPTS[0])).token_ids == expected


def test_an_adapter_brings_its_block_length_domain_and_end_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", tiny_llama)
    sql = write_adapter(tmp_path / "sql", tiny_llama)
    write_card(sql, CllmCard(format_version=1, block_length=32, domain="text-to-sql"))
    info = make_engine(tiny_llama, adapters={"plain": str(plain), "sql": str(sql)}).info
    facts = [(a.name, a.block_length, a.domain, a.rank, a.eos_token_ids) for a in info.adapters]
    assert facts == [
        ("plain", info.block_length, None, 4, info.eos_token_ids),
        ("sql", 32, "text-to-sql", 4, info.eos_token_ids),
    ]
    assert make_engine(tiny_llama, adapters={"sql": str(sql)}, block_length=3).info.adapters[0].block_length == 3


def test_stats_name_the_adapter_of_each_row(tiny_llama: Path, adapters: dict[str, str]) -> None:
    engine = make_engine(tiny_llama, adapters=adapters)
    for name in ("", "sql", "chat"):
        engine.add_request(ask(name, PROMPTS[0]))
    engine.step()
    assert engine.stats().adapter_per_row == ("", "sql", "chat")
    assert len(engine.stats().accepted_per_row) == 3


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("more", "../outside", "lies outside of the folder"),
        ("more", "/etc", "lies outside of the folder"),
        ("more", "link", "lies outside of the folder"),
        ("more", "nothing", "nothing: has no adapter_config.json"),
        ("more", "cllm-none", "no built-in adapter of this name"),
        ("sql", "chat", "adapter 'sql' is loaded already"),
        ("more", "wide", "has rank 8, more than max_adapter_rank=4 allows"),
    ],
)
def test_what_may_not_be_loaded_is_refused_in_words(
    tiny_llama: Path, tmp_path: Path, name: str, path: str, message: str
) -> None:
    root = tmp_path / "root"
    write_adapter(tmp_path / "outside", tiny_llama)
    first = write_adapter(root / "chat", tiny_llama)
    write_adapter(root / "wide", tiny_llama, r=8)
    (root / "link").symlink_to(tmp_path / "outside")
    engine = make_engine(tiny_llama, adapters={"sql": str(first)}, adapter_root=str(root), max_adapter_rank=4)
    with pytest.raises(ModelLoadError, match=message):
        engine.load_adapter(name, path)
    assert [adapter.name for adapter in engine.info.adapters] == ["sql"]


def test_an_engine_without_a_folder_to_load_from_loads_nothing(tiny_llama: Path, adapters: dict[str, str]) -> None:
    with pytest.raises(ModelLoadError, match="without adapter_root"):
        make_engine(tiny_llama).load_adapter("sql", adapters["sql"])
    with pytest.raises(InvalidRequest, match="serves no adapters"):
        make_engine(tiny_llama).add_request(ask("sql", PROMPTS[0]))


def test_adapters_do_not_stand_beside_a_merged_one(tiny_llama: Path, adapters: dict[str, str]) -> None:
    with pytest.raises(ModelLoadError, match="is itself an adapter, so adapters chat cannot be served beside it"):
        make_engine(Path(adapters["sql"]), adapters={"chat": adapters["chat"]})


def test_an_adapter_may_not_have_the_name_of_the_base(
    tiny_llama: Path, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    name = tiny_llama.name
    with pytest.raises(ConfigError, match=f"'{name}' is the name of the base model"):
        make_engine(Path(name), adapters={name: adapters["sql"]})


def test_steps_without_adapter_rows_compute_the_same_bits_as_without_adapters(
    tiny_llama: Path, adapters: dict[str, str]
) -> None:
    """In bfloat16, where this processor has packed weights and native kernels, any other order of sums would show."""
    params = {"logprobs": 3, "ignore_eos": True}
    answers = [
        decode_one(make_engine(tiny_llama, dtype="bfloat16", **settings), ask("", PROMPTS[0], **params))
        for settings in ({}, {"adapters": adapters})
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == answers[1].logprobs


def test_a_bfloat16_engine_decodes_with_adapters(tiny_llama: Path, adapters: dict[str, str]) -> None:
    engine = make_engine(tiny_llama, dtype="bfloat16", adapters=adapters)
    answers = tokens(decode(engine, [ask(name, PROMPTS[0]) for name in ("", "sql", "chat")]))
    exact = tokens(
        decode(make_engine(tiny_llama, adapters=adapters), [ask(name, PROMPTS[0]) for name in ("", "sql", "chat")])
    )
    # Rounding moves near ties in long texts; the first tokens have wide margins in these models.
    assert {name: ids[0] for name, ids in answers.items()} == {name: ids[0] for name, ids in exact.items()}
    assert len({tuple(ids) for ids in answers.values()}) == 3


def test_room_is_left_for_adapters_that_may_be_loaded_later(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []

    def note(config: EngineConfig, *, reserved_bytes: int, **_: object) -> int:
        reserved.append(reserved_bytes)
        return 64

    monkeypatch.setattr(build, "num_cache_blocks", note)
    make_engine(tiny_llama, max_adapters=3)
    make_engine(tiny_llama, max_adapters=3, max_adapter_rank=10, adapter_root="adapters")
    # Hidden 64, two layers: q and o 64 -> 64, k and v 64 -> 32, gate and up 64 -> 128, down 128 -> 64.
    num_features = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64))
    assert reserved == [0, 3 * 10 * num_features * 4]


def test_a_broken_chat_template_is_refused_at_load(tiny_llama: Path, tmp_path: Path) -> None:
    (write_adapter(tmp_path, tiny_llama) / "chat_template.jinja").write_text("{% for")
    with pytest.raises(ModelLoadError, match="chat template, line 1"):
        make_engine(tiny_llama, adapters={"sql": str(tmp_path)})
