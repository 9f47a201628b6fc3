"""The benchmark runs as its first lines say, and ends in its line of figures."""

import json
import sys

import pytest

from tests import benchmark
from tests.shared import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "questions", "peaks"), [("2024-08-26", [4], set()), ("2025-06-21", [1, 8], {"plain", "ours"})]
)
def test_the_benchmark_on_the_small_checkpoint(monkeypatch, capsys, release, questions, peaks):
    """Peak memory is that of processes of their own, which take longer than all the rest: once."""
    words = ["--tiny", "--rounds", "1", "--release", release, *([] if peaks else ["--memory_batch_size", "0"])]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--questions_per_picture", *map(str, questions)])
    monkeypatch.chdir(ROOT)
    benchmark.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {f"ratio_{count}_question{'s' if count > 1 else ''}" for count in questions} | {"share_of_matmul_rate"}
    assert figures.keys() == names | {f"peak_gib_{side}" for side in peaks}
    assert all(value > 0 for value in figures.values())
