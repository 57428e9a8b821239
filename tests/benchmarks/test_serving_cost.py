"""What the command line of the serving cost refuses."""

import sys

import pytest

from benchmarks import serving_cost


@pytest.mark.parametrize("words", [["--steps", "1"], ["--requests", "1"], ["--rounds", "0"]])
def test_what_leaves_nothing_to_measure_is_refused_before_anything_is_started(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was divided by zero, once server and worker were up."""
    monkeypatch.setattr(serving_cost, "worker", lambda *args: pytest.fail("a worker was started"))
    monkeypatch.setattr(sys, "argv", ["serving_cost", "some/model", *words])
    with pytest.raises(SystemExit) as ended:
        serving_cost.main()
    assert ended.value.code == 2
    assert f"{' '.join(words)}: must be >= " in capsys.readouterr().err
