"""Recording trajectories with the engine."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cllm_core.engine.engine import Engine
from cllm_core.errors import ConfigError, DataError
from cllm_core.llm import LLM
from cllm_core.request import SamplingParams
from cllm_core.training.config import DataConfig, TrajectoryConfig
from cllm_core.training.examples import Trajectory, local_block
from cllm_core.training.store import read_records
from cllm_core.training.trajectories import Recorder, record_trajectories
from tests.training.factories import no_progress, write_lines

BLOCK_LENGTH = 5
MAX_TOKENS = 20
PROMPTS = [(i, (1, 10 + i, 20, 30 + i, 40)) for i in range(5)]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), device="cpu", dtype="float32", adaptive_block_length=False, max_num_seqs=3)


@pytest.fixture
def engine(llm: LLM) -> Iterator[Engine]:
    yield llm.engine
    assert llm.engine.observer is None
    assert not llm.engine.has_work()


def record(engine: Engine) -> dict[int, Trajectory]:
    return dict(Recorder(engine, block_length=BLOCK_LENGTH, max_tokens=MAX_TOKENS).run(PROMPTS))


def make_config(checkpoint: Path, folder: Path, **changes: object) -> TrajectoryConfig:
    data = write_lines(folder / "prompts.jsonl", [{"prompt": f"the token {i}"} for i in range(5)])
    settings: dict[str, object] = {
        "model": str(checkpoint),
        "output": folder / "out",
        "data": DataConfig(data=str(data)),
        "block_length": 4,
        "max_tokens": 8,
        "keep_unfinished": True,
        "max_repetition": 1.0,
        "shard_size": 2,
        "device": "cpu",
    }
    return TrajectoryConfig(**settings | changes)  # type: ignore[arg-type]


def test_answers_are_those_of_greedy_decoding(llm: LLM, engine: Engine) -> None:
    found = record(engine)
    expected = llm.generate(
        [ids for _, ids in PROMPTS], SamplingParams(temperature=0, max_tokens=MAX_TOKENS), progress=False
    )
    assert [found[i].output_ids for i, _ in PROMPTS] == [result.outputs[0].token_ids for result in expected]
    assert [found[i].prompt_ids for i, _ in PROMPTS] == [ids for _, ids in PROMPTS]


def test_states_lead_to_the_fixed_point(engine: Engine) -> None:
    """Every iteration accepts its right draft tokens and one more, so the next state begins behind them."""
    for trajectory in record(engine).values():
        answer = trajectory.output_ids
        starts = [state.num_accepted for state in trajectory.states] + [len(answer)]
        assert starts[0] == 0
        for state, following in zip(trajectory.states, starts[1:], strict=True):
            right = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(state.draft_ids, answer[state.num_accepted :], strict=False))
                    if a != b
                ),
                None,
            )
            if right is not None:
                assert following == state.num_accepted + right + 1
            assert len(state.draft_ids) == min(BLOCK_LENGTH, MAX_TOKENS - state.num_accepted) - 1


def test_local_targets_are_what_the_model_predicts(llm: LLM, engine: Engine) -> None:
    """The drafts of states may be copies of the text; a random model repeats itself, so that many are."""
    num_copied = 0
    for trajectory in record(engine).values():
        for state, following in zip(trajectory.states, trajectory.states[1:], strict=False):
            assert state.unaccepted_ids is not None
            num_copied += following.draft_ids[: len(state.unaccepted_ids)] != state.unaccepted_ids
            block = local_block(trajectory.output_ids, state, following)
            if block is None:
                continue
            seen = trajectory.prompt_ids + trajectory.output_ids[: block.start]
            for depth, target in enumerate(block.target_ids, start=1):
                assert target == greedy(llm, seen + block.draft_ids[:depth])
    assert num_copied


def greedy(llm: LLM, prompt_ids: tuple[int, ...]) -> int:
    """The model's token behind the prompt."""
    found = llm.generate([prompt_ids], SamplingParams(temperature=0, max_tokens=1), progress=False)
    return found[0].outputs[0].token_ids[0]


def test_closing_early_frees_the_engine(engine: Engine) -> None:
    run = Recorder(engine, block_length=BLOCK_LENGTH, max_tokens=MAX_TOKENS).run(PROMPTS)
    next(run)
    run.close()  # type: ignore[attr-defined]
    engine.check()


def test_second_run_records_only_what_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    record_trajectories(make_config(tiny_llama, whole), no_progress)
    data = DataConfig(data=str(parts / "prompts.jsonl"), limit=2)
    record_trajectories(make_config(tiny_llama, parts, data=data), no_progress)
    before = list(read_records(parts / "out"))
    record_trajectories(make_config(tiny_llama, parts), no_progress)
    after = list(read_records(parts / "out"))
    assert after[:2] == before
    assert sorted(after, key=lambda r: r.index) == sorted(read_records(whole / "out"), key=lambda r: r.index)


def test_prompts_that_changed_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Their indices were taken for recorded, so that one folder held the answers of two files."""
    record_trajectories(make_config(tiny_llama, tmp_path), no_progress)
    config = make_config(tiny_llama, tmp_path)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"the token {i}"} for i in (0, 7, 2, 3, 4, 5)])
    with pytest.raises(DataError, match=r"of other data \(prompt 2 differs\)"):
        record_trajectories(config, no_progress)


def test_recording_in_another_way_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, tmp_path)
    record_trajectories(config, no_progress)
    data = msgspec.structs.replace(config.data, split="test", limit=3)
    changed = make_config(tiny_llama, tmp_path, data=data, keep_unfinished=False, max_repetition=0.5)
    with pytest.raises(DataError) as refusal:
        record_trajectories(changed, no_progress)
    for message in ("split was 'train'", "keep_unfinished was True", "max_repetition was 1.0, is 0.5"):
        assert message in str(refusal.value)
    assert "limit" not in str(refusal.value)


def test_prompts_are_not_written_in_another_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllm_core.training.self_written._TRIES", 200)
    folder = record_trajectories(make_config(tiny_llama, tmp_path, data=DataConfig(), self_written=1), no_progress)
    written = (folder / "prompts.jsonl").read_bytes()
    hotter = make_config(tiny_llama, tmp_path, data=DataConfig(), self_written=2, prompt_temperature=1.5)
    with pytest.raises(DataError, match=r"prompt_temperature was 1\.0, is 1\.5"):
        record_trajectories(hotter, no_progress)
    assert (folder / "prompts.jsonl").read_bytes() == written


def test_prompts_that_do_not_fit_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "long.jsonl", [{"prompt": "the token " * 400}, {"prompt": "short"}])
    folder = record_trajectories(make_config(tiny_llama, tmp_path, data=DataConfig(data=str(data))), no_progress)
    assert [record.dropped for record in read_records(folder)] == ["prompt too long", None]
    assert '"prompt too long": 1' in (folder / "statistics.json").read_text()


def test_model_writes_its_own_prompts_once(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllm_core.training.self_written._TRIES", 200)  # a random model seldom ends a turn
    config = make_config(tiny_llama, tmp_path, data=DataConfig(), self_written=3)
    folder = record_trajectories(config, no_progress)
    written = (folder / "prompts.jsonl").read_bytes()
    assert len(set(written.splitlines())) == 3
    record_trajectories(config, no_progress)
    assert (folder / "prompts.jsonl").read_bytes() == written
    assert len(list(read_records(folder))) == 3


def test_prompts_written_before_an_interruption_are_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were saved once all were written, so that an interrupted run began anew."""
    monkeypatch.setattr("cllm_core.training.self_written._TRIES", 200)
    config = make_config(tiny_llama, tmp_path, data=DataConfig(), self_written=4)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cllm_core.training.self_written.tqdm.update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            record_trajectories(config, no_progress)
    kept = (config.output / "prompts.jsonl").read_bytes()
    assert kept
    record_trajectories(config, no_progress)
    assert (config.output / "prompts.jsonl").read_bytes().startswith(kept)


def test_block_length_1_records_answers_alone(tiny_llama: Path, tmp_path: Path) -> None:
    folders = [
        record_trajectories(make_config(tiny_llama, tmp_path, block_length=n, output=tmp_path / str(n)), no_progress)
        for n in (1, 4)
    ]
    alone, jacobi = ({r.index: r.trajectory for r in read_records(folder)} for folder in folders)
    assert {i: t.output_ids for i, t in alone.items()} == {i: t.output_ids for i, t in jacobi.items()}
    assert not any(trajectory.states for trajectory in alone.values())


def test_wrong_settings_and_data_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data, self_written"):
        make_config(tiny_llama, tmp_path, self_written=3)
    with pytest.raises(ConfigError, match=r"limit=2: .*with self_written leave it out"):
        make_config(tiny_llama, tmp_path, data=DataConfig(limit=2), self_written=3)
    with pytest.raises(ConfigError, match=r"block_length=0"):
        make_config(tiny_llama, tmp_path, block_length=0)
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        record_trajectories(make_config(tiny_llama, tmp_path, data=DataConfig(data="absent.jsonl")), no_progress)


def test_processes_of_a_launch_share_the_prompts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_config(tiny_llama, tmp_path, output=tmp_path / "alone")
    record_trajectories(alone, no_progress)
    shared = make_config(tiny_llama, tmp_path, output=tmp_path / "shared")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", [1, 3]), ("0", [0, 1, 2, 3, 4])):
        monkeypatch.setenv("RANK", rank)
        record_trajectories(shared, no_progress)
        assert sorted(record.index for record in read_records(shared.output)) == expected
    by_index = {record.index: record for record in read_records(alone.output)}
    assert {record.index: record for record in read_records(shared.output)} == by_index


def test_processes_of_a_launch_write_no_prompts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_config(tiny_llama, tmp_path, data=DataConfig(), self_written=3)
    with pytest.raises(ConfigError, match=r"self_written=3: .*has 0 prompts.*without torchrun"):
        record_trajectories(config, no_progress)
