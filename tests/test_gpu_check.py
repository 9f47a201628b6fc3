"""The check of a card says so where there is none, and works: it is rehearsed on the CPU."""

import json
import runpy
import sys

import pytest

from tests import gpu_check
from tests.child import Children
from tests.gpu_check import run
from tests.shared import ROOT


def test_without_a_card_it_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) is None
    assert capsys.readouterr().out == "No CUDA card here, so there is nothing to check.\n"


@pytest.mark.parametrize("differences", [(0.01, 0.1), (0.01, 0.11, 0.02), (float("nan"),)])
def test_a_figure_out_of_its_bounds_is_marked_and_remembered(differences, capsys):
    table = gpu_check.Table()
    for difference in differences:
        table.difference("a loss", difference, 0.1)
    bad = [not difference <= 0.1 for difference in differences]
    assert table.is_good == (not any(bad))
    assert ["OUT OF BOUNDS" in line for line in capsys.readouterr().out.splitlines()[2:]] == bad


def test_without_what_tests_need_programs_say_so_in_one_line(monkeypatch):
    """Whoever has a card has what training needs, no more."""
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(SystemExit, match=r"^error: the programs of tests/ need .*: pip install -r tests/require.*txt$"):
        runpy.run_path(str(ROOT / "tests" / "shared.py"))


def run_in_children(flags, launcher=(), stop_at=None, **environment):
    """As `gpu_check.run`, without launchers and interpreters, but for a run that is to be stopped."""
    if stop_at:
        return run(flags, stop_at=stop_at, **environment)
    children = Children(2 if launcher else 1, flags, flags["output_dir"].with_suffix(".said"), **environment)
    assert set(children.wait()) == {0}, children[0].text()
    log = flags["output_dir"] / "training_log.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_it_works(monkeypatch, capsys):
    """All but the golden figures, which test_golden.py compares."""
    monkeypatch.setattr(gpu_check, "run", run_in_children)
    for name in ("golden_encoder", "golden_text_model", "golden_figures"):
        monkeypatch.setattr(gpu_check, name, lambda *arguments: None)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--rehearse"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    rows = [line for line in printed.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| a step's loss, of the CPU's in float32",
        "| a step's gradient, of the CPU's in float32",
        "| pictures are encoded",
        "| steps, as they are",
        "| steps, rows not padded",
        "| steps, a mask over whole rows",
        "| steps, with cuDNN's attention",
        "| steps, with COMPILE",
        "| peak by the arithmetic of docs/memory.md",
        "| a run that is stopped and goes on: its last loss",
        "| two processes, DDP: its last loss",
    ]
    assert sum(row.endswith("| ok |") for row in rows) == 4
    assert all("questions/s" in row and "tokens/s" in row for row in rows if row.startswith("| steps"))
