"""Runs that are killed, stopped, starved of disk or started wrongly: what they leave behind, and how they go on."""

import json
import os
import random
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import checkpoints, features, optimizer
from moondream2.checkpoints import Interrupted, Stop, move_into, only_run_in
from moondream2.cli import InputError
from moondream2.files import write_text, write_whole
from tests.child import Child
from tests.conftest import TINY, dataset, make_run

KILLS = int(os.environ.get("KILLS", 20))


@pytest.fixture
def flags(data):
    return {
        "model_id": TINY,
        "train_file": data / "train.jsonl",
        "valid_file": data / "valid.jsonl",
        "features_dir": data / "features",
        "output_dir": data / "out",
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "checkpoint_steps": 1,
        "valid_answers": 3,
    }


def log_of(folder):
    """The training log without the times."""
    records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_result(folder, expected):
    assert log_of(folder) == log_of(expected)
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (folder / "predictions.jsonl").read_text() == (expected / "predictions.jsonl").read_text()
    assert not (folder / "checkpoints").exists()


def assert_no_model_or_a_whole_one(folder):
    """What a person may find in OUTPUT_DIR at any moment."""
    if (folder / "config.json").exists():
        json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "pt") as file, safe_open(TINY / "model.safetensors", "pt") as base:
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


def test_moving_takes_the_decisive_file_away_first_and_brings_it_last(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, content in ((source, "new"), (target, "old")):
        folder.mkdir()
        for name in ("config.json", "a", "z"):
            (folder / name).write_text(content)
    seen = []
    replace = checkpoints.Path.replace

    def watched(self, destination):
        seen.append((self.name, (target / "config.json").exists()))
        return replace(self, destination)

    monkeypatch.setattr(checkpoints.Path, "replace", watched)
    move_into(source, target, last="config.json")
    assert {name for name, _ in seen[:2]} == {"a", "z"} and seen[2:] == [("config.json", False)]
    assert not any(decisive for _, decisive in seen)
    assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys(("config.json", "a", "z"), "new")


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted runs
# ---------------------------------------------------------------------------------------------------------------------


def test_killed_anywhere_it_goes_on_to_the_same_bits(flags, tmp_path):
    """kill -9 at seeded random moments, in training, validation, checkpoints and the final save."""
    assert Child({**flags, "output_dir": tmp_path / "first", "epochs": 1}, tmp_path / "first.txt").wait() == 0
    started = time.monotonic()
    assert Child({**flags, "output_dir": tmp_path / "whole"}, tmp_path / "whole.txt").wait() == 0
    seconds = time.monotonic() - started
    draw, kills, runs = random.Random(KILLS), 0, 0
    while kills < KILLS:
        folder, runs = tmp_path / f"killed{runs}", runs + 1
        while not (folder / "config.json").exists() or (folder / "checkpoints").exists():
            child = Child({**flags, "output_dir": folder}, tmp_path / "out.txt")
            if kills < KILLS:
                child.process.join(draw.uniform(0.2, 1.0) * seconds)
            if child.process.exitcode is None and kills < KILLS:
                child.kill()
                kills += 1
            else:
                assert child.wait() == 0, child.text()
            assert_no_model_or_a_whole_one(folder)
        assert_same_result(folder, tmp_path / "whole")


def die_after_a_checkpoint(run):
    if run.checkpoints.newest():
        raise KeyboardInterrupt


def test_killed_between_checkpoint_and_log_it_still_writes_the_log(flags, run_main, monkeypatch):
    flags["epochs"] = 1
    with monkeypatch.context() as patch:
        patch.setattr(script, "write_log", die_after_a_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            run_main(**flags)
    run_main(**flags)
    assert [record["epoch"] for record in log_of(flags["output_dir"])] == [0, 1]


class StopAt(Stop):
    """Asks to stop at the n-th check."""

    n = None

    def check(self):
        StopAt.n -= 1
        if StopAt.n == 0:
            raise Interrupted(signal.SIGTERM)


def test_stopped_anywhere_it_goes_on_to_the_same_bits(flags, run_main, tmp_path, monkeypatch, capsys):
    run_main(**{**flags, "output_dir": tmp_path / "whole"})
    monkeypatch.setattr(script, "Stop", StopAt)
    StopAt.n, stops = 2, 0
    while not (tmp_path / "out" / "config.json").exists():
        try:
            run_main(**{**flags, "output_dir": tmp_path / "out", "checkpoint_steps": 1000})
        except SystemExit as stopped:
            assert stopped.code == 143
            assert "Stopped by SIGTERM. The same command goes on from there." in capsys.readouterr().out
            assert_no_model_or_a_whole_one(tmp_path / "out")
            stops += 1
            StopAt.n = 2 + stops % 3
    assert stops > 3
    assert "Going on in epoch 2 after step" in capsys.readouterr().out
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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(flags, tmp_path, signum):
    child = Child({**flags, "epochs": 1000}, tmp_path / "out.txt")
    while "Before training" not in child.text() if child.out.exists() else True:
        time.sleep(0.05)
    os.kill(child.process.pid, signum)
    assert child.wait(60) == 128 + signum
    assert "The same command goes on from there." in child.text()
    assert "Traceback" not in child.text()
    assert list((flags["output_dir"] / "checkpoints").glob("epoch-*"))


def test_a_second_signal_ends_at_once(flags, tmp_path, monkeypatch):
    stop = Stop(Accelerator())
    stop.ask(signal.SIGTERM, None)
    try:
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(Interrupted):
            stop.check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_asks_all_processes_to_end_is_left_to_the_run(tiny, tokenizer, data, tmp_path, monkeypatch, capfd):
    """Ctrl-C goes to the workers of data loaders too, and a service manager's SIGTERM: they do what they are at."""
    train = dataset(data / "train.jsonl", tokenizer)
    run, workers = make_run(tiny, tokenizer, train, train, tmp_path / "features"), tmp_path / "workers"
    decode, handlers = features.pixels_of, {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def asked(result):
        assert torch.utils.data.get_worker_info()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with workers.open("a") as file:
            file.write(".")
        return result

    monkeypatch.setattr(features, "pixels_of", lambda *args: asked(decode(*args)))
    monkeypatch.setattr(script.Run, "device", SimpleNamespace(type="cuda"))  # whose data loaders have workers
    run.collate = lambda examples: asked({"failed": [], "numbers": len(examples)})
    Stop(Accelerator()).check()
    try:
        assert features.encode_pictures(list(train.pictures.values()), tiny.vision_encoder, run.store, 2, show=False)
        assert all(run.store.load(key) is not None for key in train.pictures)
        assert [batch["numbers"] for batch in script.collated(run, train, [[0], [1, 2]], "")] == [1, 2]
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert len(workers.read_text()) == len(train.pictures) + 2
    assert "finishing" not in capfd.readouterr().out


def test_a_full_disk_anywhere_is_one_line_and_loses_nothing(flags, tmp_path):
    """No file may grow beyond a limit that the features, then the checkpoints, break."""
    weights = (TINY / "model.safetensors").stat().st_size
    for limit in (10_000, weights // 2):
        child = Child(flags, tmp_path / "out.txt", file_size=limit)
        assert child.wait() == 1
        last = child.text().strip().splitlines()[-1]
        assert last.startswith("error: cannot write "), child.text()
        assert "Traceback" not in child.text()
        assert not list(flags["output_dir"].glob("checkpoints/epoch-*"))
    assert Child(flags, tmp_path / "out.txt").wait() == 0
    assert_no_model_or_a_whole_one(flags["output_dir"])


def test_only_as_many_checkpoints_as_needed(flags, run_main, monkeypatch):
    kept = []
    finish = script.finish_epoch

    def watched(run):
        finish(run)
        kept.append([path.name for path in run.checkpoints.folder.iterdir()] if run.checkpoints.folder.exists() else [])

    monkeypatch.setattr(script, "finish_epoch", watched)
    run_main(**flags)
    assert kept == [[], ["epoch-0002-step-00000000"], ["epoch-0003-step-00000000"]]
    assert sorted(path.name for path in flags["output_dir"].iterdir() if path.name != ".lock") == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_moondream2.py",
        "predictions.jsonl",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
    ]


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


def test_two_may_write_a_file_at_once(tmp_path):
    path = tmp_path / "file"
    with write_whole(path) as first:
        first.write_text("first")
        with write_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_second_run_in_the_same_folder_leaves(flags, run_main):
    with only_run_in(flags["output_dir"]), pytest.raises(InputError, match="another run is writing to"):
        run_main(**flags)


def test_what_goes_wrong_elsewhere_is_not_said_of_the_output_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), only_run_in(tmp_path):
        (tmp_path / "elsewhere").read_text()
    with only_run_in(tmp_path):  # was let go
        pass


def test_a_folder_that_cannot_be_made_is_one_line(flags, run_main, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write to .*file/out"):
        run_main(**{**flags, "output_dir": tmp_path / "file" / "out"})


# ---------------------------------------------------------------------------------------------------------------------
# The best epoch
# ---------------------------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_saved(flags, run_main, tokenizer, data, capsys):
    """Validation wants other answers than training, so it overfits: the best epoch is saved, not the last."""
    valid = flags["valid_file"].read_text()
    flags["valid_file"].write_text(
        valid.replace("A box", "One").replace("Nobody knows", "A box").replace("One.", "No.")
    )
    run_main(**{**flags, "epochs": 6, "learning_rate": 5e-3})
    losses = [record["valid_loss"] for record in log_of(flags["output_dir"])][1:]
    best = min(range(6), key=losses.__getitem__)
    assert best < 5 and losses[best] < losses[-1]
    out = capsys.readouterr().out
    assert f"Best epoch: {best + 1} of 6 (Validation Avg Loss {losses[best]:.4f})" in out
    assert f"What followed was worse and is not in the saved model: {losses[best + 1]:.4f}" in out
    saved = AutoModelForCausalLM.from_pretrained(flags["output_dir"], dtype=torch.bfloat16)
    train, valid = (dataset(data / f"{split}.jsonl", tokenizer) for split in ("train", "valid"))
    run = make_run(saved, tokenizer, train, valid, batch_size=4)
    assert script.evaluate(run)[0] == pytest.approx(losses[best], rel=0.01)
    assert abs(losses[-1] - losses[best]) > 0.02 * losses[best]
    base = load_file(TINY / "model.safetensors")
    for name, tensor in saved.state_dict().items():
        if not name.startswith("text_model."):
            assert torch.equal(tensor, base[name].bfloat16()), name


def test_patience_stops_early(flags, run_main, monkeypatch, capsys):
    losses = iter([2.0, 1.7609, 1.7252, 1.7986, 1.9750, 2.0121])
    monkeypatch.setattr(script, "evaluate", lambda run: (next(losses), {}))
    run_main(**{**flags, "epochs": 5, "patience": 2})
    out = capsys.readouterr().out
    assert "No better validation loss for 2 epochs: stopping early." in out
    assert "Best epoch: 2 of 5 (Validation Avg Loss 1.7252)" in out
    assert [record["valid_loss"] for record in log_of(flags["output_dir"])] == [2.0, 1.7609, 1.7252, 1.7986, 1.9750]


def test_keeping_the_best_epoch_is_a_second_name_not_a_copy(flags, run_main, monkeypatch):
    links = []
    finish = script.finish_epoch

    def watched(run):
        finish(run)
        newest = run.checkpoints.newest()
        if newest:
            links.append((newest / "best.safetensors").stat().st_ino == (newest / "model.safetensors").stat().st_ino)

    monkeypatch.setattr(script, "finish_epoch", watched)
    losses = iter([2.0, 1.8, 1.9])
    monkeypatch.setattr(script, "evaluate", lambda run: (next(losses), {}))
    run_main(**flags)
    assert links == [True, False]
