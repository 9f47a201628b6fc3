"""Runs that are killed, stopped, starved of disk or started wrongly: what they leave behind, and how they go on."""

import copy
import json
import math
import os
import pickle
import random
import shutil
import signal
import time
from concurrent.futures import wait
from contextlib import nullcontext
from functools import partial
from threading import Event, Timer
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import checkpoints, optimizer
from moondream2.checkpoints import Checkpoints, Interrupted, Progress, Stop, bytes_on, copy_of, resume_or_start
from moondream2.cli import InputError
from moondream2.files import to_json, write_text, write_whole
from moondream2.modeling_moondream2 import Answer
from moondream2.optimizer import build_optimizer, build_scheduler
from moondream2.output_dir import OutputDir
from tests.child import Child
from tests.launched import signalled_while_it_writes, writing_in_background
from tests.shared import TINY, both_releases, untimed

pytestmark = pytest.mark.smallest


@pytest.fixture
def flags(data, small_model):
    return {
        "model_id": small_model,
        "train_file": data / "train.jsonl",
        "valid_file": data / "valid.jsonl",
        "features_dir": data / "features",
        "output_dir": data / "out",
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "checkpoint_minutes": 1e-9,  # one a step
        "valid_answers": 3,
    }


def log_of(folder):
    """The training log without the times."""
    records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [untimed(record) for record in records]


def assert_same_result(folder, expected):
    assert log_of(folder) == log_of(expected)
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    names = ["predictions.jsonl", *(path.name for path in expected.glob("test_predictions.jsonl"))]
    assert [(folder / name).read_text() for name in names] == [(expected / name).read_text() for name in names]
    assert not (folder / "checkpoints").exists()


def assert_no_model_or_a_whole_one(folder, base):
    """What a person may find in OUTPUT_DIR at any moment, of a run that began with the model `base`."""
    if (folder / "config.json").exists():
        json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "pt") as file, safe_open(base / "model.safetensors", "pt") as base:
            assert set(file.keys()) == set(base.keys())
        assert (folder / "modeling_moondream2.py").stat().st_size > 10_000
        json.loads((folder / "tokenizer.json").read_text())
    if (folder / "training_log.jsonl").exists():
        log_of(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError), write_whole(tmp_path / "file") as beside:
        beside.write_text("new")
        raise KeyError
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(InputError, match=r"cannot write .*file: No space left on device"):
        write_text(tmp_path / "file", "new")


def test_a_folder_is_put_in_place_whole(tmp_path):
    for content in ("old", "new"):
        with write_whole(tmp_path / "folder") as beside:
            beside.mkdir()
            (beside / "file").write_text(content)
            assert not (tmp_path / "folder").exists() or (tmp_path / "folder" / "file").read_text() == "old"
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_json_has_no_number_that_json_lacks():
    record = {"loss": math.nan, "more": [math.inf, (1.5, -math.inf)], "name": "NaN", "best": None, "is": True}
    assert to_json(record) == '{"loss": null, "more": [null, [1.5, null]], "name": "NaN", "best": null, "is": true}'


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_anywhere_it_goes_on_to_the_same_bits(flags, test_file, tmp_path, most):
    """kill -9 at seeded random moments, in training, validation, checkpoints, the test and the final save.

    Checkpoints come by each step or by the end alone, written at once or while training goes on.
    """
    flags["test_file"] = test_file
    assert Child({**flags, "output_dir": tmp_path / "first", "epochs": 1}, tmp_path / "first.txt").wait() == 0
    started = time.monotonic()
    assert Child({**flags, "output_dir": tmp_path / "whole"}, tmp_path / "whole.txt").wait() == 0
    seconds = time.monotonic() - started
    draw, kills, runs = random.Random(most), 0, 0
    while kills < most:
        folder, runs = tmp_path / f"killed{runs}", runs + 1
        while not (folder / "config.json").exists() or list(folder.glob("checkpoints/epoch-*")):
            flags["checkpoint_minutes"] = draw.choice([1e-6, 1e-3, 1000])
            setup = draw.choice([None, writing_in_background])
            child = Child({**flags, "output_dir": folder}, tmp_path / "out.txt", setup=setup)
            if kills < most:
                child.process.join(draw.uniform(0.2, 1.0) * seconds)
            if child.process.exitcode is None and kills < most:
                child.kill()
                kills += 1
            else:
                assert child.wait() == 0, child.text()
            assert_no_model_or_a_whole_one(folder, flags["model_id"])
        if (folder / "checkpoints").exists():  # killed while it removed them: the next start does
            assert Child({**flags, "output_dir": folder}, tmp_path / "out.txt").wait() == 1
        assert_same_result(folder, tmp_path / "whole")


def die_after_a_checkpoint(output, name, records):
    if Checkpoints(output).newest():
        raise KeyboardInterrupt


def test_killed_between_checkpoint_and_log_it_still_writes_the_log(flags, run_main, monkeypatch):
    flags["epochs"] = 1
    with monkeypatch.context() as patch:
        patch.setattr(script.OutputDir, "write_lines", die_after_a_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            run_main(**flags)
    run_main(**flags)
    assert [record["epoch"] for record in log_of(flags["output_dir"])] == [0, 1]


class StopAt(Stop):
    """Asks to stop at the n-th time that it is asked."""

    n = None

    def heed(self, asked, due):
        StopAt.n -= 1
        if StopAt.n == 0:
            raise Interrupted(signal.SIGTERM)
        return due


@both_releases
def test_stopped_anywhere_it_goes_on_to_the_same_bits(flags, test_file, run_main, tmp_path, monkeypatch, capsys):
    flags["test_file"] = test_file
    run_main(**{**flags, "output_dir": tmp_path / "whole"})
    monkeypatch.setattr(script, "Stop", StopAt)
    StopAt.n, stops, said = 2, 0, ""
    while not (tmp_path / "out" / "config.json").exists():
        try:
            run_main(**{**flags, "output_dir": tmp_path / "out", "checkpoint_minutes": 1000})
        except SystemExit as stopped:
            assert stopped.code == 143
            out = capsys.readouterr().out
            assert "Stopped by SIGTERM. The same command goes on from there." in out
            said += out
            assert_no_model_or_a_whole_one(tmp_path / "out", flags["model_id"])
            stops += 1
            StopAt.n = 2 + stops % 3
    assert stops > 3
    assert "Going on in epoch 2 after step" in said
    assert_same_result(tmp_path / "out", tmp_path / "whole")


def test_going_on_makes_no_second_state_of_the_optimizer(flags, run_main, monkeypatch):
    """One way to load it first makes one by a step: on a full card there is no room for both."""
    monkeypatch.setattr(script, "Stop", StopAt)
    StopAt.n = 4
    with pytest.raises(SystemExit):
        run_main(**flags)
    steps, load = [], script.Checkpoints.load
    step = optimizer.AdamW.step
    monkeypatch.setattr(optimizer.AdamW, "step", lambda self, closure=None: (steps.append(1), step(self)))

    def loaded(*arguments):
        load(*arguments)
        assert not steps

    monkeypatch.setattr(script.Checkpoints, "load", loaded)
    StopAt.n = 1000
    run_main(**flags)
    assert steps


@pytest.mark.parametrize(
    ("signum", "setup", "told", "written"),
    [(signal.SIGINT, None, "Before training", 0), (signal.SIGTERM, signalled_while_it_writes, "\nwriting", 2)],
)
def test_a_signal_finishes_the_step_and_says_how_to_go_on(flags, tmp_path, signum, setup, told, written):
    """A checkpoint that is being written is waited for, as is that of the step."""
    child = Child({**flags, "epochs": 1000}, tmp_path / "out.txt", setup=setup)
    while told not in child.text() if child.out.exists() else True:
        time.sleep(0.05)
    os.kill(child.process.pid, signum)
    assert child.wait(60) == 128 + signum
    assert "The same command goes on from there." in child.text()
    assert "Traceback" not in child.text()
    # One more where the step after it waited already, when the signal came, for its own to be written.
    assert child.text().count("\nwriting") == child.text().count("\nwritten") in (written, written and written + 1)
    (checkpoint,) = (flags["output_dir"] / "checkpoints").iterdir()
    assert checkpoint.name.startswith("epoch-")


def test_a_second_signal_ends_at_once():
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Stop(Accelerator()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        for check in (stop.check, stop.check_alone):
            with pytest.raises(Interrupted, match="SIGTERM"):
                check()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_full_disk_anywhere_is_one_line_and_loses_nothing(flags, tmp_path):
    """No file may grow beyond a limit that the features, then the checkpoints, break."""
    weights = (flags["model_id"] / "model.safetensors").stat().st_size
    for limit in (10_000, weights // 2):
        child = Child(flags, tmp_path / "out.txt", file_size=limit, setup=writing_in_background)
        assert child.wait() == 1
        last = child.text().strip().splitlines()[-1]
        assert last.startswith("error: cannot write "), child.text()
        assert "Traceback" not in child.text()
        assert not list(flags["output_dir"].glob("checkpoints/epoch-*"))
    assert Child(flags, tmp_path / "out.txt").wait() == 0
    assert_no_model_or_a_whole_one(flags["output_dir"], flags["model_id"])


def test_stopped_before_its_first_applied_step_it_goes_on_to_the_same_bits(flags, run_main, tmp_path, monkeypatch):
    """The first step's gradient is not finite, so the optimizer has no state yet when the run is stopped behind it."""
    backward, number = Accelerator.backward, 0

    def first_is_nan(accelerator, loss, **arguments):
        nonlocal number
        number += 1
        backward(accelerator, loss * (math.nan if number == 1 else 1), **arguments)

    monkeypatch.setattr(Accelerator, "backward", first_is_nan)
    run_main(**{**flags, "output_dir": tmp_path / "whole"})
    number = 0

    class StopAfterIt(Stop):
        def heed(self, asked, due):
            if number:
                raise Interrupted(signal.SIGTERM)
            return due

    with monkeypatch.context() as patch:
        patch.setattr(script, "Stop", StopAfterIt)
        with pytest.raises(SystemExit):
            run_main(**flags)
    run_main(**flags)
    assert_same_result(flags["output_dir"], tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Trained:
    """A layer in bfloat16 that trains, and its checkpoints in `folder`."""

    def __init__(self, folder):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
        optimizer = build_optimizer(model, 1e-2, 0.01, (0.9, 0.999))
        self.scheduler = build_scheduler(optimizer, "linear", 0, 100)
        accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.progress = Progress({"SEED": 0}, 4, epoch=1)
        self.checkpoints = Checkpoints(OutputDir(folder))
        self.checkpoints.watch(accelerator, self.model, self.optimizer, self.scheduler)

    def step(self):
        torch.manual_seed(self.progress.step)
        self.model(torch.randn(4, 8, dtype=torch.bfloat16)).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.step += 1

    def end_epoch(self, is_best):
        """A step, with which its epoch ends; returns the weight."""
        self.step()
        if is_best:
            self.progress.best_epoch = self.progress.epoch
        self.progress.end_epoch({"epoch": self.progress.epoch})
        if is_best:
            self.checkpoints.save_best(self.progress)
        return self.model.weight.detach().clone()

    def bits(self):
        """The weights, and how the optimizer stands."""
        groups = [{name: each for name, each in group.items() if name != "params"} for group in self.groups()]
        states = [{name: each.tolist() for name, each in state.items()} for state in self.optimizer.state.values()]
        return [p.tolist() for p in self.model.parameters()], groups, states

    def groups(self):
        return self.optimizer.param_groups


@pytest.fixture
def trained(tmp_path):
    """What trains, and whose checkpoints lie in a folder that the run holds."""
    with OutputDir(tmp_path / "out").held("hub/model"):
        yield Trained(tmp_path / "out")


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_checkpoint_brings_back_every_bit(trained, steps):
    """Without a step, too: torch would make one to ask the optimizer for its state."""
    for _ in range(steps):
        trained.step()
    before = trained.bits()
    trained.checkpoints.save(trained.progress)
    assert trained.bits() == before
    again = Trained(trained.checkpoints.output_dir.path)
    again.checkpoints.load()
    again.progress = again.checkpoints.progress()
    assert again.bits() == before and again.progress == trained.progress
    for each in (trained, again):
        each.step()
    assert trained.bits() == again.bits()
    assert [group["step"] for group in again.groups()] == [steps + 1] * 2


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_only_as_many_checkpoints_as_needed(trained):
    """The newest, with the weights of its best epoch, which are no copy, and beside it those of a best one since."""
    checkpoints, progress = trained.checkpoints, trained.progress
    for epoch in (1, 2):
        weights = trained.end_epoch(is_best=True)
        before = [f"epoch-00000{epoch}-step-00000001"] if epoch > 1 else []
        assert names(checkpoints) == [f"best-epoch-00000{epoch}.safetensors", *before]
        best = (checkpoints.folder / f"best-epoch-00000{epoch}.safetensors").stat().st_ino
        checkpoints.save(progress)
        assert names(checkpoints) == [f"epoch-00000{epoch + 1}-step-00000000"]
        assert {(checkpoints.newest() / f"{name}.safetensors").stat().st_ino for name in ("best", "model")} == {best}
        trained.step()
        checkpoints.save(progress)
        assert names(checkpoints) == [f"epoch-00000{epoch + 1}-step-00000001"]
        assert (checkpoints.newest() / "best.safetensors").stat().st_ino == best
        assert torch.equal(checkpoints.best_weights()["weight"], weights)
        saved = load_file(checkpoints.newest() / "model.safetensors")["weight"]
        assert torch.equal(saved, trained.model.weight) and not torch.equal(saved, weights)


def test_of_several_best_epochs_since_a_checkpoint_the_last_is_kept(trained):
    weights = [trained.end_epoch(is_best) for is_best in (True, True, False)]
    assert names(trained.checkpoints) == ["best-epoch-000002.safetensors"]
    trained.checkpoints.save(trained.progress)
    assert names(trained.checkpoints) == ["epoch-000004-step-00000000"]
    assert torch.equal(trained.checkpoints.best_weights()["weight"], weights[1])
    assert torch.equal(load_file(trained.checkpoints.newest() / "model.safetensors")["weight"], weights[2])


@pytest.mark.parametrize("is_there", [False, True])
def test_a_run_that_goes_on_never_finds_a_best_epoch_of_its_future(trained, is_there):
    """Killed behind one, it comes to that epoch anew, on a card with other sums: here it is not the best any more."""
    first = trained.end_epoch(is_best=True)
    if is_there:
        trained.checkpoints.save(trained.progress)
    trained.end_epoch(is_best=True)
    assert "best-epoch-000002.safetensors" in names(trained.checkpoints)
    again = Trained(trained.checkpoints.output_dir.path)
    again.checkpoints.output_dir.read_marker()
    (again.checkpoints.folder / ".best-epoch-000002.safetensors.0123abcd.part").write_text("half")
    (again.checkpoints.folder / ".epoch-000003-step-00000000.0123abcd.part").mkdir()
    again.progress = resume(again)
    assert again.progress.best_epoch == is_there
    if not is_there:
        assert not again.checkpoints.folder.exists()
        return
    assert names(again.checkpoints) == ["epoch-000002-step-00000000"]
    again.checkpoints.load()
    again.end_epoch(is_best=False)
    again.checkpoints.save(again.progress)
    assert names(again.checkpoints) == ["epoch-000003-step-00000000"]
    assert torch.equal(again.checkpoints.best_weights()["weight"], first)


def test_what_else_lies_beside_checkpoints_stays(trained):
    folder = trained.checkpoints.folder
    for _ in range(2):
        trained.step()
        trained.checkpoints.save(trained.progress)
        for name in ("epoch-best", "notes.txt", ".mine.0123abcd.part"):
            (folder / name).write_text("mine")
        (folder / ".epoch-000001-step-00000009.0123abcd.part").mkdir()  # what a killed run left
        (folder / ".best-epoch-000001.safetensors.0123abcd.part").write_text("half")
        (folder / "best-epoch-000001.safetensors").write_text("whole")
    trained.checkpoints.discard()
    assert names(trained.checkpoints) == [".mine.0123abcd.part", "epoch-best", "notes.txt"]
    assert trained.checkpoints.newest() is None


def test_killed_while_it_discards_it_leaves_whole_checkpoints_only(trained, monkeypatch):
    """The newest goes last: of an older one the run would go on once more."""
    trained.checkpoints.save(trained.progress)
    newest = trained.checkpoints.newest()
    (newest.parent / "epoch-000000-step-00000001").mkdir()
    removed = []

    def killed(path):
        removed.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("moondream2.files.remove", killed)
    with pytest.raises(KeyboardInterrupt):
        trained.checkpoints.discard()
    assert removed[0].startswith(".epoch-000000-step-00000001.")
    assert trained.checkpoints.newest() == newest
    with pytest.raises(KeyboardInterrupt):
        trained.checkpoints.discard()
    assert trained.checkpoints.newest() is None


def resume(trained, step_size=4, overwrite=False):
    constants = SimpleNamespace(batch_size=step_size, grad_accum_steps=1, overwrite=overwrite)
    return resume_or_start(trained.checkpoints, {"SEED": 0}, constants, processes=1)


@pytest.mark.parametrize("change", [{"version": 0}, {"version": None}, {"steps": 5}, {"tracker_id": None}])
def test_a_checkpoint_of_another_version_is_one_line(trained, change):
    trained.checkpoints.save(trained.progress)
    path = trained.checkpoints.newest() / "progress.json"
    saved = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in saved.items() if value is not None}))
    said = r"epoch-000001-step-00000000 was written by another version.*OUTPUT_DIR.*--overwrite true"
    with pytest.raises(InputError, match=said):
        resume(trained, step_size=4, overwrite=False)
    new = resume(trained, step_size=4, overwrite=True)
    assert new.epoch == 0 and trained.checkpoints.newest() is None


def test_progress_is_kept_as_it_is(trained, capsys):
    progress = resume(trained, step_size=4, overwrite=False)
    progress.epoch, progress.left_out = 3, [("train.jsonl:1", "broken")]
    progress.answers_best = {"0123": Answer("No", 0.1 + 0.2, True)}
    trained.checkpoints.save(progress)
    again = resume(trained, step_size=8, overwrite=False)
    assert again == progress and again.answers_best["0123"].is_cut
    assert "Going on in epoch 3 after step 0" in capsys.readouterr().out
    assert len(progress.tracker_id) == 16 and progress.tracker_id != Progress({}).tracker_id


def test_a_checkpoint_is_due_so_many_minutes_after_the_last(trained, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    trained.checkpoints.watch(Accelerator(), trained.model, trained.optimizer, trained.scheduler)
    for _ in range(2):
        now += 119
        assert not trained.checkpoints.is_due(2)
        now += 1
        assert trained.checkpoints.is_due(2)
        trained.checkpoints.save(trained.progress)


def test_a_loss_that_is_not_finite_is_never_the_best(trained):
    progress = Progress({}, epoch=1, history=[{"epoch": 0, "valid_loss": 0.1}])
    for loss, is_best in [(math.nan, False), (2.0, True), (math.inf, False), (2.0, False), (None, False), (1.5, True)]:
        assert progress.is_best(loss) is is_best
        progress.history.append({"epoch": len(progress.history), "valid_loss": loss})
    trained.checkpoints.save(progress)
    losses = [0.1, None, 2.0, None, 2.0, None, 1.5]
    assert [record["valid_loss"] for record in trained.checkpoints.progress().history] == losses


def test_without_a_best_epoch_no_model_is_saved():
    with pytest.raises(InputError, match="no epoch had a finite validation loss.*LEARNING_RATE"):
        Progress({}, epoch=6).require_best()
    Progress({}, best_epoch=1).require_best()


# ---------------------------------------------------------------------------------------------------------------------
# Written while training goes on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_background(trained, monkeypatch):
    """What trains, writes in the background, and when it may: an Event."""
    checkpoints, trained.may_write, trained.written = trained.checkpoints, Event(), []

    def when_it_may(write, *what):
        assert trained.may_write.wait(60)
        time.sleep(0.02)
        write(*what)
        trained.written.append("ends")

    for name in ("write", "write_best"):
        monkeypatch.setattr(checkpoints, name, partial(when_it_may, getattr(checkpoints, name)))
    monkeypatch.setattr(Checkpoints, "in_background", lambda self, size: trained.written.append("begins") is None)
    yield trained
    trained.may_write.set()


def test_what_is_written_is_what_it_was_when_it_was_saved(in_background):
    """Weights, both moments, low bits, rate, progress: of none of them does training change the copy."""
    trained, checkpoints = in_background, in_background.checkpoints
    trained.step()
    bits, progress, rate = trained.bits(), copy.deepcopy(trained.progress), trained.scheduler.get_last_lr()
    checkpoints.save(trained.progress)
    trained.step()
    trained.progress.left_out.append(["train.jsonl:1", "broken"])
    assert checkpoints.newest() is None and trained.bits() != bits
    trained.may_write.set()
    checkpoints.join()
    again = Trained(checkpoints.output_dir.path)
    again.checkpoints.load()
    assert again.bits() == bits and again.scheduler.get_last_lr() == rate != trained.scheduler.get_last_lr()
    assert again.checkpoints.progress() == progress != trained.progress


def test_one_is_written_at_a_time(in_background):
    """And memory holds one copy: the next is made when that is written."""
    trained, checkpoints = in_background, in_background.checkpoints
    trained.may_write.set()
    trained.step()
    checkpoints.save(trained.progress)
    weights = trained.end_epoch(is_best=True)
    trained.step()
    checkpoints.save(trained.progress)
    checkpoints.save(trained.progress)  # there it is, once written
    checkpoints.save_best(trained.progress)
    checkpoints.join()
    assert trained.written == ["begins", "ends"] * 4
    assert torch.equal(checkpoints.best_weights()["weight"], weights)


@pytest.mark.parametrize("then", ["is_due", "save", "save_best", "at the end"])
def test_what_can_not_be_written_is_said_at_the_next_safe_place(in_background, monkeypatch, then):
    trained, checkpoints = in_background, in_background.checkpoints
    trained.may_write.set()
    checkpoints.save(trained.progress)
    checkpoints.join()
    before = names(checkpoints)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moondream2.checkpoints.save_file", full)
    trained.step()
    checkpoints.save(trained.progress)
    with pytest.raises(InputError, match=r"cannot write .*epoch-000001-step-00000001: No space left on device"):
        if then == "is_due":
            wait([checkpoints.writing])
            checkpoints.is_due(1000)
        elif then == "at the end":
            with checkpoints.saved_at_the_end(trained.progress):
                pass
        else:
            getattr(checkpoints, then)(trained.progress)
    assert names(checkpoints) == before
    assert not checkpoints.is_due(1000)


@pytest.mark.parametrize("error", [None, Interrupted(signal.SIGTERM), KeyError()], ids=["ends", "is stopped", "fails"])
def test_a_run_that_ends_waits_for_what_is_written(in_background, error):
    """And where it comes to its end, or is stopped, for the checkpoint with which the next one goes on."""
    trained, checkpoints = in_background, in_background.checkpoints
    trained.progress.total_steps = 1
    with pytest.raises(type(error)) if error else nullcontext(), checkpoints.saved_at_the_end(trained.progress):
        trained.step()
        checkpoints.save(trained.progress)
        trained.step()
        Timer(0.2, trained.may_write.set).start()
        if error:
            raise error
    steps = 1 if isinstance(error, KeyError) else 2
    assert names(checkpoints) == [f"epoch-000001-step-0000000{steps}"]


@pytest.mark.parametrize(
    ("device", "free", "is_copied"),
    [
        ("cuda:0", 1.0, True),
        ("cuda", 1.0, True),
        ("cuda:0", 0.999, False),
        ("cpu", 9.0, False),
        ("mps", 9.0, False),
    ],
)
def test_training_goes_on_meanwhile_on_a_card_where_memory_has_room_for_a_copy(
    trained, monkeypatch, device, free, is_copied
):
    """Of 8.5 GB, and for what else wants some: 2 GiB. A CPU's memory is what training itself needs."""
    available = int(free * (8_500_000_000 + (2 << 30)))
    monkeypatch.setattr("moondream2.checkpoints.free_memory", lambda: available)
    trained.checkpoints.accelerator = SimpleNamespace(device=torch.device(device))
    assert trained.checkpoints.in_background(8_500_000_000) is is_copied


def test_what_is_gathered_from_several_cards_into_memory_is_not_copied_again():
    """As FSDP does: what training has is on the device."""
    state = {"weights": [torch.zeros(3, dtype=torch.bfloat16), (torch.zeros(5), 1, None)], "name": "AdamW"}
    assert (bytes_on("cpu", state), bytes_on("cuda", state)) == (26, 0)
    for device, is_same in (("cuda", True), ("cpu", False)):
        copied = copy_of(device, state)
        assert copied["name"] == "AdamW" and copied["weights"][1][1:] == (1, None)
        assert (copied["weights"][0].data_ptr() == state["weights"][0].data_ptr()) is is_same
        assert (copied["weights"][1][0].data_ptr() == state["weights"][1][0].data_ptr()) is is_same


# ---------------------------------------------------------------------------------------------------------------------
# Starting over, or not
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(flags, run_main, monkeypatch):
    """A folder with the checkpoint of a run that was stopped in its first epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(script, "Stop", StopAt)
        StopAt.n = 5
        with pytest.raises(SystemExit):
            run_main(**flags)
    return flags


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", 5e-4, "LEARNING_RATE was 0.001, is 0.0005"),
        ("seed", 1, "SEED was 0, is 1"),
        ("batch_size", 2, "BATCH_SIZE x GRAD_ACCUM_STEPS was 4, is 2"),
        ("grad_accum_steps", 2, "BATCH_SIZE x GRAD_ACCUM_STEPS was 4, is 8"),
        ("lr_schedule", "cosine", "LR_SCHEDULE was constant, is cosine"),
    ],
)
def test_another_runs_checkpoint_is_refused(interrupted, run_main, name, value, said):
    with pytest.raises(InputError, match=rf"{said}.*OUTPUT_DIR.*--overwrite true"):
        run_main(**{**interrupted, name: value})
    assert list((interrupted["output_dir"] / "checkpoints").glob("epoch-*"))


def test_other_data_is_refused(interrupted, run_main):
    path = interrupted["train_file"]
    path.write_text(path.read_text().replace("A box", "The box"))
    with pytest.raises(InputError, match="TRAIN_FILE was"):
        run_main(**interrupted)


def test_overwrite_discards_another_runs_checkpoint(interrupted, run_main, capsys):
    run_main(**{**interrupted, "learning_rate": 5e-4, "overwrite": "true"})
    assert "Going on" not in capsys.readouterr().out
    assert log_of(interrupted["output_dir"])[-1]["learning_rate"] == 5e-4


def test_a_run_goes_on_from_another_directory_with_all_its_answers(interrupted, run_main, monkeypatch):
    """Those from before training too, though the files' names are others now."""
    folder = interrupted["valid_file"].parent
    monkeypatch.chdir(folder)
    run_main(**{**interrupted, "train_file": "./train.jsonl", "valid_file": "valid.jsonl"})
    answers = [json.loads(line) for line in (interrupted["output_dir"] / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and all(each["before"] is not None and each["after"] is not None for each in answers)
    assert all(each["source"].startswith("valid.jsonl:") for each in answers)


def test_a_run_goes_on_in_smaller_pieces(interrupted, run_main, tmp_path, capsys):
    """As README advises where memory ran out; a step remains the same step, but for rounding."""
    pieces = {"batch_size": 2, "grad_accum_steps": 2, "gradient_checkpointing": "true"}
    run_main(**{**interrupted, **pieces})
    assert "Going on in epoch 1 after step" in capsys.readouterr().out
    run_main(**{**interrupted, "output_dir": tmp_path / "whole"})
    for mine, other in zip(log_of(interrupted["output_dir"]), log_of(tmp_path / "whole"), strict=True):
        assert mine["valid_loss"] == pytest.approx(other["valid_loss"], rel=0.02)


def test_overwrite_goes_on_with_its_own_checkpoint(interrupted, run_main, capsys):
    run_main(**{**interrupted, "overwrite": "true"})
    assert "Going on in epoch 1 after step" in capsys.readouterr().out


def test_more_epochs_may_be_added(interrupted, run_main, tmp_path):
    run_main(**{**interrupted, "epochs": 3})
    run_main(**{**interrupted, "epochs": 3, "output_dir": tmp_path / "whole"})
    assert_same_result(interrupted["output_dir"], tmp_path / "whole")


def test_a_finished_model_is_not_overwritten_silently(flags, run_main):
    flags["epochs"] = 1
    run_main(**flags)
    before = (flags["output_dir"] / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a finished model.*OUTPUT_DIR.*--overwrite true"):
        run_main(**{**flags, "seed": 1})
    assert (flags["output_dir"] / "model.safetensors").read_bytes() == before
    run_main(**{**flags, "seed": 1, "overwrite": "true"})
    assert (flags["output_dir"] / "model.safetensors").read_bytes() != before


def test_a_run_that_was_to_replace_a_model_goes_on_where_it_was_stopped(flags, run_main, monkeypatch, capsys):
    """Typed again with or without OVERWRITE, though the model before it is still there."""
    run_main(**{**flags, "epochs": 1})
    before = (flags["output_dir"] / "model.safetensors").read_bytes()
    for number, overwrite in ((3, "true"), (7, "false")):
        with monkeypatch.context() as patch:
            patch.setattr(script, "Stop", StopAt)
            StopAt.n = number
            with pytest.raises(SystemExit):
                run_main(**{**flags, "seed": 1, "overwrite": overwrite})
    assert (flags["output_dir"] / "model.safetensors").read_bytes() == before
    assert "Going on in epoch 1 after step" in capsys.readouterr().out
    run_main(**{**flags, "seed": 1})
    assert "Going on in epoch" in capsys.readouterr().out
    assert (flags["output_dir"] / "model.safetensors").read_bytes() != before


def test_two_may_write_a_file_at_once(tmp_path):
    path = tmp_path / "file"
    with write_whole(path) as first:
        first.write_text("first")
        with write_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_second_run_in_the_same_folder_leaves(flags, run_main):
    with OutputDir(flags["output_dir"]).held(TINY), pytest.raises(InputError, match="another run is writing to"):
        run_main(**flags)


# ---------------------------------------------------------------------------------------------------------------------
# The best epoch
# ---------------------------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_saved(flags, run_main, monkeypatch, capsys):
    """With the losses of the run that overfitted: the second epoch's weights, bit for bit, and no others.

    At the end of an epoch these alone are written, and all that it takes to go on behind the last.
    """
    losses, seen, written = [9.0, 1.7609, 1.7252, 1.7986, 1.9750, 2.0121], [], []
    write_lines = script.OutputDir.write_lines

    def noting(output, name, records):
        write_lines(output, name, records)
        folder = output.path / "checkpoints"
        written.append({path.name: path.stat().st_ino for path in folder.iterdir()} if folder.exists() else {})

    def judged(model, *arguments):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return losses[len(seen) - 1], {}

    monkeypatch.setattr(script, "evaluate", judged)
    monkeypatch.setattr(script.OutputDir, "write_lines", noting)
    run_main(**{**flags, "model_id": TINY, "epochs": 5, "checkpoint_minutes": 1000})
    first, second = (f"best-epoch-00000{number}.safetensors" for number in (1, 2))
    assert [[*each] for each in written[:6]] == [[], [first], [second], [second], [second], [second]]
    assert written[2] == written[5]  # it is not written again
    assert [*written[6]] == ["epoch-000006-step-00000000"]
    out = capsys.readouterr().out
    assert "Best epoch: 2 of 5 (Validation Avg Loss 1.7252)" in out
    assert "What followed was worse and is not in the saved model: 1.7986, 1.9750, 2.0121" in out
    saved = AutoModelForCausalLM.from_pretrained(flags["output_dir"], dtype=torch.bfloat16).state_dict()
    base = load_file(TINY / "model.safetensors")
    for name, tensor in saved.items():
        is_trained = name.startswith("text_model.")
        assert torch.equal(tensor, seen[2][name]), name
        assert torch.equal(tensor, base[name].bfloat16()) != is_trained, name
        assert not is_trained or not torch.equal(tensor, seen[1][name]), name
        assert not is_trained or not torch.equal(tensor, seen[3][name]), name


def test_patience_stops_early(flags, run_main, monkeypatch, capsys):
    losses = iter([2.0, 1.7609, 1.7252, 1.7986, 1.9750, 2.0121])
    monkeypatch.setattr(script, "evaluate", lambda *args: (next(losses), {}))
    run_main(**{**flags, "epochs": 5, "patience": 2})
    out = capsys.readouterr().out
    assert "No better validation loss for 2 epochs: stopping early." in out
    assert "Best epoch: 2 of 5 (Validation Avg Loss 1.7252)" in out
    assert [record["valid_loss"] for record in log_of(flags["output_dir"])] == [2.0, 1.7609, 1.7252, 1.7986, 1.9750]


# ---------------------------------------------------------------------------------------------------------------------
# What killing a process can't show
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_flushed_before_it_gets_its_name_and_its_name_behind_it(tmp_path, monkeypatch):
    """A power cut keeps what was flushed: so never a name without its content."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("gets its name"), replace(*paths)))
    with write_whole(tmp_path / "folder") as beside:
        beside.mkdir()
        for name in ("a", "b"):
            (beside / name).write_text(name)
    folder = tmp_path / "folder"
    a, b, whole, parent = (path.stat().st_ino for path in (folder / "a", folder / "b", folder, tmp_path))
    assert done == [a, b, whole, "gets its name", parent]


def test_a_best_epoch_is_flushed_with_the_checkpoint_that_it_is_of(trained, monkeypatch):
    """Until then a run that dies has no use for it, and does not wait for the disk."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("gets its name"), replace(*paths)))
    trained.end_epoch(is_best=True)
    (best,) = trained.checkpoints.folder.iterdir()
    inode = best.stat().st_ino
    assert inode not in done
    done.clear()
    trained.checkpoints.save(trained.progress)
    assert inode in done[: done.index("gets its name")]


class Malicious:
    def __reduce__(self):
        return pytest.fail, ("its code was run",)


def test_a_checkpoint_runs_no_code(trained):
    trained.step()
    trained.checkpoints.save(trained.progress)
    torch.save({"scheduler": Malicious()}, trained.checkpoints.newest() / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        trained.checkpoints.load()


# ---------------------------------------------------------------------------------------------------------------------
# Going on along a schedule, and with another encoder
# ---------------------------------------------------------------------------------------------------------------------


def stop_in_first_epoch(flags, run_main, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(script, "Stop", StopAt)
        StopAt.n = 6
        with pytest.raises(SystemExit):
            run_main(**flags)


def test_stopped_in_a_schedule_it_goes_on_to_the_same_bits(flags, run_main, monkeypatch, tmp_path):
    flags |= {"lr_schedule": "cosine", "warmup_steps": 3, "epochs": 1}
    run_main(**{**flags, "output_dir": tmp_path / "whole"})
    stop_in_first_epoch(flags, run_main, monkeypatch)
    with pytest.raises(InputError, match="EPOCHS was 1, is 2"):  # with which the rate would fall more slowly
        run_main(**{**flags, "epochs": 2})
    run_main(**flags)
    assert_same_result(flags["output_dir"], tmp_path / "whole")


def test_a_checkpoint_of_another_encoder_is_refused(flags, run_main, monkeypatch, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    flags["model_id"] = tmp_path / "model"
    stop_in_first_epoch(flags, run_main, monkeypatch)
    weights = load_file(TINY / "model.safetensors")
    weights["vision_encoder.projection.mlp.fc2.bias"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="vision_encoder was"):
        run_main(**flags)


def test_an_epochs_seconds_are_those_before_and_after_an_interruption(flags, run_main, monkeypatch):
    stop_in_first_epoch(flags, run_main, monkeypatch)
    (file,) = flags["output_dir"].glob("checkpoints/epoch-000001-*/progress.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 1000.0}))
    run_main(**flags)
    lines = (flags["output_dir"] / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] > 1000 for line in lines] == [False, True, False]


def test_a_checkpoint_is_read_into_memory_and_not_onto_the_card(trained, monkeypatch):
    """Which has no room for a second state of the optimizer."""
    trained.checkpoints.save(trained.progress)
    places, load = [], torch.load

    def load_to(path, map_location=None, **words):
        places.append(map_location)
        return load(path, map_location, **words)

    monkeypatch.setattr(torch, "load", load_to)
    trained.checkpoints.load()
    assert places == ["cpu"]
