"""`cllm check`: right models, wrong ones, and what cannot be loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

from cllm_core.backends import choose
from cllm_core.backends.cpu.library import load_kernels
from cllm_core.models import paged
from cllm_core.models.embedded import cache_folder
from server.cli import app
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too


def check(model: Path, *options: str) -> Result:
    words = ["check", str(model), "--device", "cpu", "--tokens", "60", *options]
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, words)


def facts_of(result: Result) -> dict[str, str]:
    lines = (line.split("  ", 1) for line in result.stdout.splitlines())
    return {name: fact.strip() for name, fact in lines}


def test_a_model_that_is_served_right_tells_how(tiny_llama: Path) -> None:
    result = check(tiny_llama)
    assert result.exit_code == 0
    facts = facts_of(result)
    assert facts["model"] == f"{tiny_llama}: LlamaForCausalLM, float32 on cpu"
    assert facts["rope"] == "default"
    assert facts["tests"] == "compare this architecture and rope"
    assert facts["paged cache"].startswith("equal: off by ")
    assert facts["as served"].startswith("equal: off by ")
    assert facts["attention"].startswith("torch, gathering the cache")


def test_a_model_that_would_be_served_wrong_ends_with_another_exit_code(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = paged.PagedStep.attend

    def attend_to_less(self: paged.PagedStep, *given: Any) -> Tensor:
        layer, query, key, value, scoring = given
        return attend(self, layer, query, key, value, replace(scoring, window=3))

    monkeypatch.setattr(paged.PagedStep, "attend", attend_to_less)
    result = check(tiny_llama)
    assert result.exit_code == 1
    assert facts_of(result)["paged cache"].startswith("DIFFERS: off by ")
    assert facts_of(result)["as served"].startswith("DIFFERS: off by ")


def test_in_bfloat16_rounding_is_compared_with_that_of_transformers(tiny_llama: Path) -> None:
    result = check(tiny_llama, "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "transformers in bfloat16 by 0.0" in facts_of(result)["as served"]


def test_the_precision_shown_is_the_one_that_the_backend_computes_in(
    export: Export,  # noqa: F811 - the fixture
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bfloat16 model that is cast to float32, for a processor without bfloat16, was shown as bfloat16."""
    if load_kernels(cache_folder()) is None:
        pytest.skip("there is no C compiler here")
    monkeypatch.setattr(choose, "has_bfloat16", lambda device: False)
    folder = export(tiny_llama, tmp_path / "folder", dtype="bf16")
    facts = facts_of(check(folder, "--cache-block-size", "8"))  # not for the kernels
    assert facts["model"].endswith("LlamaForCausalLM, float32 on cpu")
    assert "transformers in bfloat16 by 0.0" in facts["as served"]


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    result = check(tmp_path / "nothing")
    assert result.exit_code == 2
    assert "no such file or folder" in result.stderr
