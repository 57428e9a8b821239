"""What can be told of the run on a CUDA device without one: it lists what is wrong and what it left out."""

import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import gpu
from benchmarks.gpu import Run, check_correctness, describe_machine, mixed_steps, slow_paths
from cllm_core.models.attention import register_paged_attention
from cllm_core.models.model import PagedModel
from cllm_core.models.paged import RowSpan
from cllm_core.models.static_steps import Buckets, Work
from tests.engine.factories import paged_model
from tests.models.table_attention import attend_plainly

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_machine_without_git_has_an_unknown_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_machine(CPU)["commit"] == "unknown"


def test_parts_without_time_are_listed() -> None:
    run = Run(CPU, deadline=time.monotonic() + 600)
    assert run.has_time("early")
    late = Run(CPU, deadline=time.monotonic() - 1)
    assert not late.has_time("late")
    assert (run.left_out, late.left_out) == ([], ["late"])


def test_wrong_logits_and_tokens_are_listed_and_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    register_paged_attention()
    tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setattr(gpu, "CHECKED", tiny)
    monkeypatch.setattr(gpu, "MAX_RELATIVE_ERROR", 0.0)
    decode = gpu._decode

    def decode_wrongly(*args: object, **settings: object) -> list[list[int]]:
        outputs = decode(*args, **settings)  # type: ignore[arg-type]
        outputs[2][7] += 1
        return outputs

    monkeypatch.setattr(gpu, "_decode", decode_wrongly)
    run = Run(CPU, deadline=0.0)
    found = check_correctness(run, graphs=False)
    assert found["tokens_equal"] == 5 * 3 * 48  # of five block lengths, four prompts less one, 48 tokens
    tokens, logits = run.failures[:-1], run.failures[-1]
    assert len(tokens) == 5
    assert all("prompt 2: token 7 is" in failure for failure in tokens)
    assert "logits differ" in logits


def test_a_model_that_falls_back_on_a_device_is_noticed() -> None:
    """Attention by gathering and steps without graphs give the same tokens, so nothing else would tell."""

    def repeat(work: Work) -> Work:
        work()
        return work

    gathering, by_tables, static = (PagedModel(paged_model("llama")) for _ in range(3))
    for model in (by_tables, static):
        model.use_attention(attend_plainly)
    static.allocate_cache(num_blocks=2, block_size=4)
    static.use_static_steps(repeat, buckets=Buckets.of(max_rows=1, max_tokens=4), max_model_len=8)
    index = torch.arange(3)
    static.forward(index, index, [RowSpan(0, 3, 0, (1,))], index)
    found = [len(slow_paths(model, CUDA, graphs=True)) for model in (gathering, by_tables, static)]
    assert found == [2, 1, 0]
    assert not slow_paths(by_tables, CUDA, graphs=False)
    assert not slow_paths(gathering, CPU, graphs=True)


def test_texts_of_mixed_steps_go_on_where_they_ended_in_blocks_of_their_own() -> None:
    owners: dict[int, int] = {}
    lengths: dict[int, int] = {}
    for input_ids, positions, rows, sampled in mixed_steps(2368, CPU):
        assert len(input_ids) == len(positions) == len(sampled) == sum(row.num_tokens for row in rows)
        for row in rows:
            text = row.block_ids[0]
            assert row.first_position == lengths.get(text, 0)
            lengths[text] = row.context_length
            assert all(owners.setdefault(block, text) == text for block in row.block_ids)
            assert len(row.block_ids) * gpu.BLOCK_SIZE >= row.context_length
    assert len(lengths) == gpu.NUM_TEXTS
