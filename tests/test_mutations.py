"""The list of changes that the suite is tried with: each has its place in the sources, and nothing is left out."""

import sys
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

import finetune_moondream as script
from moondream2 import cli
from moondream2.cli import InputError
from tests import forked, mutations
from tests.mutations import Change, read_changes
from tests.shared import ROOT


def test_each_change_still_applies():
    """Those that do not are named by the InputError."""
    for change in read_changes():
        assert change.changed() != (ROOT / change.file).read_text(encoding="utf-8")


def test_every_constant_and_every_module_is_changed():
    changes = read_changes()
    ignored = " ".join(change.old.replace("constants.", "c.") for change in changes if change.kind == "constants")
    assert {name for name in cli.annotations(script) if f"c.{name.lower()}" not in ignored} == set()
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("moondream2/[a-z]*.py")}
    assert modules - {change.file for change in changes} == set()


def test_a_change_whose_words_have_gone_is_stale():
    with pytest.raises(InputError, match="stale: finetune_moondream.py has 0 times: words that nobody wrote"):
        Change("kind", "finetune_moondream.py", "tests", "words that nobody wrote", "others").changed()


@pytest.mark.parametrize("test", ["test_run.py::test_it", None])
def test_a_change_that_no_test_sees_is_told_and_gives_status_1(monkeypatch, capsys, test):
    monkeypatch.setattr(mutations, "seen_by", lambda change, idle: (test, 2.0))
    monkeypatch.setattr(mutations, "Pytest", lambda: None)
    monkeypatch.setattr(sys, "argv", ["mutations.py", "--only", "gpu.*report.py"])
    with pytest.raises(SystemExit) as ended:
        mutations.main()
    assert ended.value.code == (test is None)
    _, line, total = capsys.readouterr().out.splitlines()
    assert line.strip() == (f"seen by {test}, 2 s" if test else "UNSEEN, 2 s")
    assert total.startswith(f"1 changes, {1 if test else 0} seen, ")


@pytest.mark.parametrize(
    ("status", "printed", "test"),
    [
        (0, "1 passed", None),
        (1, "FAILED tests/test_it.py::test - assert", "test_it.py::test"),
        (None, "", "it hangs"),
        (2, "ERROR tests/test_it.py - SyntaxError", None),  # of whoever wrote the change
        (5, "no tests ran", None),
    ],
)
def test_a_change_is_seen_by_a_test_that_fails_or_hangs(monkeypatch, status, printed, test):
    idle = SimpleQueue()
    idle.put(SimpleNamespace(run=lambda *arguments: (status, printed)))
    assert mutations.seen_by(read_changes()[0], idle)[0] == test


@pytest.mark.parametrize(
    ("body", "status"), [("assert True", 0), ("assert name == 'other'", 1), ("while True: pass", None)]
)
def test_pytest_runs_in_a_folder_of_its_own_and_is_ended_where_it_hangs(tmp_path, body, status):
    (tmp_path / "test_it.py").write_text(
        f"import pathlib\nname = pathlib.Path().absolute().name\ndef test():\n  {body}\n"
    )
    found, printed = forked.run(str(tmp_path), [*mutations.WORDS, "test_it.py"], 3 if status is None else 100)
    assert found == status
    assert ("1 passed" in printed) == (status == 0)
    assert ("== 'other'" in printed) == (status == 1)
