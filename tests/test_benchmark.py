"""The benchmark runs as its first lines say, and ends in its line of figures."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from tests import benchmark
from tests.child import Child
from tests.shared import ROOT


def run_benchmark(words):
    sys.argv = ["benchmark.py", *words]
    benchmark.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "questions", "peaks"), [("2024-08-26", [4], set()), ("2025-06-21", [1, 8], {"plain", "ours"})]
)
def test_the_benchmark_on_the_small_checkpoint(monkeypatch, capsys, tmp_path, release, questions, peaks):
    """Peak memory is that of processes of their own: here children, which start in no time."""

    def run_in_child(command, **settings):
        child = Child(partial(run_benchmark, command[3:]), tmp_path / "out.txt")
        assert command[1:3] == ["-m", "tests.benchmark"] and child.wait() == 0, child.text()
        return SimpleNamespace(stdout=child.text())

    monkeypatch.setattr(benchmark.subprocess, "run", run_in_child)
    words = ["--tiny", "--rounds", "1", "--release", release, *([] if peaks else ["--memory_batch_size", "0"])]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--questions_per_picture", *map(str, questions)])
    monkeypatch.chdir(ROOT)
    benchmark.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {f"ratio_{count}_question{'s' if count > 1 else ''}" for count in questions} | {"share_of_matmul_rate"}
    assert figures.keys() == names | {f"peak_gib_{side}" for side in peaks}
    assert all(value > 0 for value in figures.values())
