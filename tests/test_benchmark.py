"""The benchmark runs as the README says, and ends in its line of figures."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("release", ["2024-08-26", "2025-06-21"])
def test_the_benchmark_on_the_small_checkpoint(release):
    command = [sys.executable, "-m", "tests.benchmark", "--tiny", "--rounds", "1", "--release", release]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    names = {"ratio_1_question", "ratio_4_questions", "ratio_8_questions", "share_of_matmul_rate"}
    assert figures.keys() == names | {"peak_gib_plain", "peak_gib_ours"}
    assert all(value > 0 for value in figures.values())
