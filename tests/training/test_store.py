"""Trajectories on the disk."""

from pathlib import Path

import msgspec
import pytest
import zstandard

from cllm_core.errors import DataError
from cllm_core.info import TokenizerBundle
from cllm_core.training.cleaning import reason_to_drop, repetition
from cllm_core.training.examples import DraftState, Trajectory
from cllm_core.training.store import (
    Record,
    StoreMeta,
    TrajectoryWriter,
    read_records,
    read_trajectories,
    tokenizer_fingerprint,
)

TOKENIZER = TokenizerBundle(tokenizer_json="{}")
META = StoreMeta(model="m", tokenizer=tokenizer_fingerprint(TOKENIZER), block_length=4, max_tokens=8, prompts="p.jsonl")


def make_record(index: int, *, dropped: str | None = None) -> Record:
    return Record(index, Trajectory((1, 2), (3, 4, index), (DraftState(0, (9, 9)),)), dropped)


def write(folder: Path, *indices: int, meta: StoreMeta = META) -> None:
    with TrajectoryWriter(folder, meta, shard_size=2) as writer:
        for index in indices:
            writer.write(make_record(index))


def test_records_read_as_they_were_written_whatever_the_shards(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3, 4)
    assert list(read_records(tmp_path)) == [make_record(i) for i in range(5)]
    assert len(list(tmp_path.glob("part-*"))) == 3


def test_second_run_appends(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2)
    write(tmp_path, 3)
    assert [record.index for record in read_records(tmp_path)] == [0, 1, 2, 3]


def test_records_before_an_interruption_are_kept(tmp_path: Path) -> None:
    def interrupted_run() -> None:
        with TrajectoryWriter(tmp_path, META, shard_size=100) as writer:
            writer.write(make_record(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert list(read_records(tmp_path)) == [make_record(0)]


def test_run_in_another_way_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0)
    other = StoreMeta(model="m", tokenizer=META.tokenizer, block_length=8, max_tokens=8, prompts="p.jsonl")
    with pytest.raises(DataError, match="block_length was 4, is 8"):
        write(tmp_path, 1, meta=other)


def test_what_a_folder_did_not_note_may_be_anything(tmp_path: Path) -> None:
    """Folders of earlier versions noted less; from then on it is noted."""
    write(tmp_path, 0)
    noted = msgspec.structs.replace(META, adapter="a", keep_unfinished=True)
    write(tmp_path, 1, meta=noted)
    assert [record.index for record in read_records(tmp_path)] == [0, 1]
    with pytest.raises(DataError, match="adapter was 'a', is None"):
        write(tmp_path, 2, meta=msgspec.structs.replace(noted, adapter=None))


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have neither the prompt's fingerprint nor predictions."""
    write(tmp_path, 0)
    trajectory = b'{"prompt_ids":[1],"output_ids":[3],"states":[[0,[9]]],"finished":true}'
    line = b'{"index":0,"trajectory":' + trajectory + b',"dropped":null}\n'
    (tmp_path / "part-00000.jsonl.zst").write_bytes(zstandard.compress(line))
    assert list(read_records(tmp_path)) == [Record(0, Trajectory((1,), (3,), (DraftState(0, (9,)),)))]


def test_dropped_trajectories_are_not_trained_on(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path, META, shard_size=10) as writer:
        writer.write(make_record(0, dropped="repetition"))
        writer.write(make_record(1))
    assert read_trajectories(tmp_path, TOKENIZER) == [make_record(1).trajectory]


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0)
    (tmp_path / "part-00000.jsonl.zst").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"part-00000\.jsonl\.zst: damaged"):
        list(read_records(tmp_path))


def test_folders_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no meta\.json"):
        read_trajectories(tmp_path, TOKENIZER)
    with TrajectoryWriter(tmp_path, META, shard_size=10):
        pass
    with pytest.raises(DataError, match="no usable trajectory"):
        read_trajectories(tmp_path, TOKENIZER)
    with pytest.raises(DataError, match="tokenizer is not that of the model"):
        read_trajectories(tmp_path, TokenizerBundle(tokenizer_json="{ }"))


def test_repetition_is_the_share_of_repeated_4_grams() -> None:
    assert repetition((1, 2, 3)) == 0.0
    assert repetition(tuple(range(10))) == 0.0
    assert repetition((1, 2, 3, 4) * 3) == pytest.approx(1 - 4 / 9)


@pytest.mark.parametrize(
    ("trajectory", "reason"),
    [
        (Trajectory((1,), (2,)), "empty answer"),
        (Trajectory((1,), (2, 3), finished=False), "no end within the limit"),
        (Trajectory((1,), (2, 3) * 10), "repetition"),
        (Trajectory((1,), (2, 3, 4)), None),
        (Trajectory((1,), (*range(50), *(7,) * 10, *range(50, 99))), "word repeated ten times in a row"),
        (Trajectory((1,), (*range(50), *(7, 8, 9) * 10, *range(50, 199))), "word repeated ten times in a row"),
        (Trajectory((1,), (*range(50), *(7,) * 9, *range(50, 99))), None),
    ],
)
def test_degenerate_answers_are_dropped_with_a_reason(trajectory: Trajectory, reason: str | None) -> None:
    assert reason_to_drop(trajectory, keep_unfinished=False, max_repetition=0.3) == reason


def test_every_repetition_is_kept_on_request() -> None:
    trajectory = Trajectory((1,), (2, 3) * 100)
    assert reason_to_drop(trajectory, keep_unfinished=False, max_repetition=1.0) is None


def test_unfinished_answers_are_kept_on_request() -> None:
    trajectory = Trajectory((1,), (2, 3), finished=False)
    assert reason_to_drop(trajectory, keep_unfinished=True, max_repetition=0.3) is None
