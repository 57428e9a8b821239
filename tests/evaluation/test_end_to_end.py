"""Evaluations of tiny random models, from settings to files."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError, PromptTooLong
from cllm_core.evaluation.answering import AnsweringModel, shared_lengths
from cllm_core.evaluation.decode import Decoded, Prompt
from cllm_core.evaluation.perplexity import LikelihoodScorer
from cllm_core.evaluation.report import Results
from cllm_core.evaluation.run import EvalConfig, Evaluation, evaluate
from server.cli import app
from tests.checkpoints import write_adapter, write_checkpoint

QUESTIONS = '{"turns": ["Why?"]}\n{"turns": ["What does the server read?"]}\n{"turns": ["How?"]}\n'


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text(QUESTIONS)
    return path


def engine_config(model: Path, **settings: object) -> EngineConfig:
    return msgspec.convert(
        {"model": str(model), "device": "cpu", "num_cache_blocks": 64, "num_threads": 1, **settings}, EngineConfig
    )


def run(config: EvalConfig) -> Evaluation:
    return evaluate(config, lambda stage, fraction: None)


def chat_config(model: Path, data: Path, output: Path, **settings: object) -> EvalConfig:
    given = {"task": "chat", "data": str(data), "model": engine_config(model), "output": str(output), **settings}
    return msgspec.convert({"max_tokens": 12, "repeats": 1, "block_lengths": (4, 8), **given}, EvalConfig)


def test_model_and_target_are_compared_side_by_side(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_llama)
    config = chat_config(adapter, questions, tmp_path / "out", target=engine_config(tiny_llama))
    results = run(config).results
    assert [(cell.model, cell.block_length) for cell in results.cells] == [
        (role, length) for role in ("model", "target") for length in (1, 4, 8)
    ]
    assert all(cell.same_as_ar == 1.0 and cell.num_answers == 3 for cell in results.cells)
    assert all(cell.tokens_per_forward == 1.0 for cell in results.cells if cell.block_length == 1)
    assert results.comparison is not None
    assert results.reference == str(tiny_llama)


def test_files_hold_what_was_found(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    evaluation = run(chat_config(tiny_llama, questions, tmp_path / "out"))
    folder = tmp_path / "out"
    assert msgspec.json.decode((folder / "results.json").read_bytes(), type=Results) == evaluation.results
    page = (folder / "results.md").read_text()
    assert "| TPF | 1.00 |" in page
    assert "- machine: " in page
    assert (folder / "trajectory-model.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation.pictures[0].as_text())
    assert "12 tokens in " in console.export_text()


def test_an_interrupted_run_keeps_what_it_has(
    tiny_llama: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = chat_config(tiny_llama, questions, tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 3
    run(config)
    after = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert after[:6] == lines
    assert len(after) == 3 * 3


def interrupt_after(patch: pytest.MonkeyPatch, num_examples: int) -> None:
    """As Ctrl-C would while an example is decoded."""

    def cut(examples: list[object], **settings: object) -> Iterator[object]:
        yield from examples[:num_examples]
        raise KeyboardInterrupt

    patch.setattr("cllm_core.evaluation.run.tqdm", cut)


def test_batches_find_what_single_requests_find(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    single = run(chat_config(tiny_llama, questions, tmp_path / "single")).results.cells
    batched = run(chat_config(tiny_llama, questions, tmp_path / "batched", repeats=0)).results.cells
    assert [cell.tokens_per_second for cell in batched] == [None] * 3
    assert [cell.mean_tokens for cell in batched] == [cell.mean_tokens for cell in single]
    assert [cell.perplexity for cell in batched] == pytest.approx([cell.perplexity for cell in single])


def test_windows_are_whole_in_batches_too(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests at a large n shared the tokens of a step, so that n = 64 was measured with 16."""
    data = tmp_path / "question.jsonl"
    data.write_text("".join(f'{{"prompt": "What is {number}?"}}\n' for number in range(8)))
    config = chat_config(tiny_llama, data, tmp_path / "out", max_tokens=24, repeats=0, block_lengths=(8, 16))
    model = engine_config(tiny_llama, max_num_seqs=8, max_batched_tokens=64)
    decoded: list[tuple[int, Decoded]] = []
    decode = AnsweringModel.decode

    def note(self: AnsweringModel, prompts: Sequence[Prompt], block_length: int) -> list[Decoded]:
        outputs = decode(self, prompts, block_length)
        decoded.extend((block_length, output) for output in outputs)
        return outputs

    monkeypatch.setattr(AnsweringModel, "decode", note)
    run(msgspec.structs.replace(config, model=model))
    assert len(decoded) == 3 * 8 + 1
    for block_length, output in decoded:
        windows = [iteration for iteration in output.trajectory.iterations if not iteration.has_prompt]
        wanted = [min(block_length, 24 - window.first_position) for window in windows]
        assert [1 + len(window.draft_ids) for window in windows] == wanted


@pytest.mark.parametrize(
    ("limits", "together"),
    [
        ({}, 4),
        ({"max_batched_tokens": 64}, 2),
        ({"max_batched_tokens": 16}, 1),
        ({"num_cache_blocks": 6}, 3),
        ({"num_cache_blocks": 1}, 1),
    ],
)
def test_as_many_are_decoded_together_as_have_room(tiny_llama: Path, limits: dict[str, int], together: int) -> None:
    config = engine_config(tiny_llama, **{"max_num_seqs": 4, "cache_block_size": 16, **limits})
    model = AnsweringModel("model", config, lambda stage, fraction: None)
    assert model.num_together([Prompt((1, 2), 3), Prompt((1,) * 12, 8)], 16) == together


def test_the_limit_does_not_change_what_is_cached_of_a_prompt(
    tiny_llama: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was what the chosen examples share, so that a run that was extended held two kinds of times."""
    seen: dict[tuple[int, ...], set[int]] = {}
    decode_behind = AnsweringModel.decode_behind

    def note(self: AnsweringModel, num_cached: int, prompt: Prompt, block_length: int) -> Decoded:
        seen.setdefault(prompt.token_ids, set()).add(num_cached)
        return decode_behind(self, num_cached, prompt, block_length)

    monkeypatch.setattr(AnsweringModel, "decode_behind", note)
    for limit in (1, 3):
        run(chat_config(tiny_llama, questions, tmp_path / f"{limit}", cached_prefixes=True, limit=limit))
    assert len(seen) == 3
    assert all(len(lengths) == 1 and min(lengths) > 0 for lengths in seen.values())


def test_a_model_that_was_replaced_is_refused(
    tiny_llama: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base of an adapter and the files of a built-in name were not looked at."""
    base = write_checkpoint(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "shipped" / "cllm-tiny", base)
    monkeypatch.setattr("cllm_core.models.shipped.SHIPPED_FOLDER", tmp_path / "shipped")
    config = chat_config(Path("cllm-tiny"), questions, tmp_path / "out", block_lengths=(4,))
    run(config)
    run(msgspec.structs.replace(config, block_lengths=(4, 8)))
    for changed in (adapter / "adapter_model.safetensors", base / "model.safetensors"):
        before = changed.stat()
        os.utime(changed, (1, 1))
        with pytest.raises(ConfigError, match="holds a run with model="):
            run(config)
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    run(config)


def test_cached_prefixes_change_no_answer(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    whole = run(chat_config(tiny_llama, questions, tmp_path / "whole")).results
    cached = run(chat_config(tiny_llama, questions, tmp_path / "cached", cached_prefixes=True)).results
    assert [cell.perplexity for cell in cached.cells] == pytest.approx([cell.perplexity for cell in whole.cells])
    assert "- prompts: what another example begins with" in (tmp_path / "cached" / "results.md").read_text()
    assert "- prompts: computed whole" in (tmp_path / "whole" / "results.md").read_text()


def test_only_what_lies_behind_a_cached_prefix_is_computed(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, cache_block_size=16)
    model = AnsweringModel("model", config, lambda stage, fraction: None, prefix_caching=True)
    prompt = Prompt(tuple(range(3, 43)), 1)

    def num_computed(num_cached: int) -> int:
        model.decode_behind(num_cached, prompt, 1)
        return model._engine.stats().num_step_tokens

    assert [num_computed(num_cached) for num_cached in (0, 39, 0, 20, 39)] == [40, 8, 40, 24, 8]


def test_prompts_share_what_the_likest_other_one_begins_with() -> None:
    ids = {"a": (1, 2, 3, 4), "b": (1, 2, 3, 9, 9), "c": (1, 2, 7), "d": (8, 8), "e": (1, 2, 7)}
    assert shared_lengths(ids) == {"a": 3, "b": 3, "c": 2, "d": 0, "e": 2}


def test_the_likelihood_of_an_answer_is_the_sum_of_its_tokens(tiny_llama: Path) -> None:
    scorer = LikelihoodScorer(engine_config(tiny_llama), lambda stage, fraction: None)
    whole = scorer.negative_log_likelihood([5, 6], [7, 8, 9])
    parts = [scorer.negative_log_likelihood([5, 6, 7, 8, 9][:end], [[7, 8, 9][end - 2]]) for end in (2, 3, 4)]
    assert whole == pytest.approx(sum(parts), rel=1e-4)
    assert whole > 0


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_decoded(
    tiny_llama: Path, questions: Path, tmp_path: Path
) -> None:
    short = engine_config(tiny_llama, max_model_len=24)
    config = msgspec.structs.replace(chat_config(tiny_llama, questions, tmp_path / "out"), model=short)
    with pytest.raises(PromptTooLong, match=r"example 1: its \d+ prompt tokens"):
        run(config)
    assert not (tmp_path / "out" / "answers.jsonl").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"block_lengths": (1,)},
        {"limit": 0},
        {"repeats": -1},
        {"max_tokens": 0},
        {"cached_prefixes": True, "repeats": 0},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises((ConfigError, msgspec.ValidationError), match=next(iter(settings))):
        chat_config(tmp_path, tmp_path, tmp_path, **settings)


def test_the_command_prints_and_writes_the_results(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    words = ["eval", str(tiny_llama), "--task", "chat", "--data", str(questions), "--output", str(tmp_path / "out")]
    words += ["--limit", "1", "--max-tokens", "6", "--repeats", "1", "--num-cache-blocks", "64", "--num-threads", "1"]
    done = CliRunner().invoke(app, [*words, "--block-lengths", "4"])
    assert done.exit_code == 0, done.output
    assert "n=4*" in done.output
    assert json.loads((tmp_path / "out" / "results.json").read_bytes())["num_examples"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "chat", "--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--task", "humaneval", "--data", "nowhere.jsonl"], "--allow-code-execution"),
        (["--task", "chat", "--data", "x", "--block-lengths", "8,a"], "--block-lengths 8,a"),
        (["--task", "chat", "--data", "x", "--limit", "0"], "limit=0"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", *words, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert message in done.output
