"""What can be told of the run on a CUDA device without one: it lists what is wrong and what it left out."""

import time
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import LlamaConfig

from benchmarks import gpu
from benchmarks.gpu import (
    ReadLimit,
    Run,
    bytes_read,
    check_correctness,
    describe_machine,
    mixed_steps,
    random_model,
    slow_paths,
)
from cllm_core.backends.cuda.static_steps import Buckets, Work
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.info import ComputePath
from cllm_core.models.attention import register_paged_attention
from cllm_core.models.paged import RowSpan
from tests.backends.factories import by_tables, graphed
from tests.engine.factories import paged_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


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
    monkeypatch.setattr(gpu, "CHECKED", TINY)
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


def test_each_mode_is_checked_against_transformers_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers notes a model's attention in its config: the second reference attended to a cache it had not."""
    register_paged_attention()
    monkeypatch.setattr(gpu, "CHECKED", TINY)
    before = TINY.to_dict()
    run = Run(CPU, deadline=0.0)
    found = [check_correctness(run, graphs=False) for _ in range(2)]
    assert [part["tokens_equal"] for part in found] == [5 * 4 * 48] * 2
    assert not run.failures
    assert TINY.to_dict() == before
    assert random_model(TINY, torch.float32, attention="sdpa").config._attn_implementation == "sdpa"


def test_decoder_layers_without_kernels_are_noticed_on_a_device() -> None:
    register_paged_attention()
    for dtype, expected in ((torch.bfloat16, ["layers: torch (no compiler)"]), (torch.float32, [])):
        model = by_tables(random_model(TINY, dtype))
        assert not slow_paths(model, CUDA, graphs=False)
        model.paths = msgspec.structs.replace(model.paths, layers=ComputePath("torch", "no compiler"))
        assert slow_paths(model, CUDA, graphs=False) == expected
        assert not slow_paths(model, CPU, graphs=False)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_is_read_where_it_is_the_output_too(tied: bool) -> None:
    """Of one that is not, a step reads a row for each token, and counting all of it flattered a 7B shape by 2 %."""
    register_paged_attention()
    shape = {**TINY.to_dict(), "tie_word_embeddings": tied}
    model = random_model(LlamaConfig(**shape), torch.bfloat16)
    head = model.get_output_embeddings().weight
    inside = sum(
        weight.nbytes for name, weight in model.named_parameters() if "embed" not in name and "head" not in name
    )
    assert bytes_read(model) == inside + head.nbytes
    limit = ReadLimit(bytes_per_second=2.0 * bytes_read(model), weight_bytes=bytes_read(model))
    assert (limit.share(0.5), limit.share(1.0, cache_bytes=bytes_read(model))) == (1.0, 1.0)


def test_every_size_of_step_fits_the_engine() -> None:
    """64 rows of 64 tokens were left out without a word."""
    assert gpu._engine_config(graphs=False).max_batched_tokens == max(gpu.ROWS) * max(gpu.WINDOWS) == 4096


def test_a_model_that_falls_back_on_a_device_is_noticed() -> None:
    """Attention by gathering and steps without graphs give the same tokens, so nothing else would tell."""

    def replay(work: Work) -> Work:
        work()
        return work

    gathering = TorchBackend("this is a test").prepare(paged_model("llama"))
    tabled = by_tables(paged_model("llama"))
    static = graphed(paged_model("llama"), replay, Buckets.of(max_rows=1, max_tokens=4))
    static.allocate_cache(num_blocks=2, block_size=4)
    static.enable_graphs(max_model_len=8)
    index = torch.arange(3)
    static.forward(index, index, [RowSpan(0, 3, 0, (1,))], index)
    found = [len(slow_paths(model, CUDA, graphs=True)) for model in (gathering, tabled, static)]
    assert found == [2, 1, 0]
    assert not slow_paths(tabled, CUDA, graphs=False)
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
