"""Numbers of `weightsmith compare` that are none are refused before the first job."""

from pathlib import Path

import pytest

from weightsmith.cli import main

ARMS = ["--arm", "a: echo {seed}", "--arm", "b: echo {seed}"]


@pytest.mark.parametrize("given", [["--worth", "nan"], ["--worth", "inf"], ["--sweep", "lr=nan,1"]])
def test_a_number_that_is_not_finite_is_refused_before_anything_runs(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--metric", "loss", *ARMS, *given, "--out", str(out), "--workers", "1"])
    assert stopped.value.code == 2
    assert given[0].removeprefix("--") in capsys.readouterr().err
    assert not out.exists()
