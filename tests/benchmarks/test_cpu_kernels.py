import pytest

from benchmarks.cpu_kernels import main, table
from cllm_core.backends.cpu.library import load_library
from cllm_core.models.embedded import cache_folder


def test_the_table_shows_milliseconds_by_way_and_tokens() -> None:
    assert table({"amx": {1: 0.001, 16: 0.0025}}, [1, 16]) == [
        "| tokens | 1 | 16 |",
        "| --- | --- | --- |",
        "| amx | 1.00 | 2.50 |",
    ]


def test_every_instruction_set_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    library = load_library(cache_folder())
    if library is None:
        pytest.skip("there are no C kernels for this processor, or no C compiler")
    main(["--tokens", "1", "2", "--shapes", "64x32", "--copies", "2", "--rounds", "1"])
    names = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert names[:2] == ["tokens", "---"]
    assert set(names[2:]) - {"oneDNN"} == {name for isa in library.isas for name in (isa, f"{isa}, int8")}
