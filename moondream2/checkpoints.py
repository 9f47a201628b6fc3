"""What makes a run survive: checkpoints, signals, one run to a folder."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from moondream2.cli import InputError
from moondream2.files import remove, sync, write_whole
from moondream2.launch import any_says, from_main


class Interrupted(Exception):
    """The process was asked to end."""

    def __init__(self, signum):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """Turns the first SIGINT or SIGTERM into a wish that `check` utters at a safe place; the second ends at once.

    Of several processes each is sent the signal by the terminal and again by the launcher: there a second one is not
    more than the first, and the launcher ends what takes too long.
    """

    def __init__(self, accelerator):
        self.accelerator, self.signum = accelerator, None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.ask)

    def ask(self, signum, frame):
        is_first, is_alone = self.signum is None, self.accelerator.num_processes == 1
        self.signum = signum
        if is_alone:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
        if is_first:
            end = " Once more ends at once." if is_alone else ""
            print(f"\n{signal.Signals(signum).name}: finishing the step.{end}", flush=True)

    def check(self):
        """To be called by all processes: each of them stops where one was asked to."""
        if any_says(self.accelerator, self.signum is not None):
            raise Interrupted(self.signum or signal.SIGTERM)

    def check_alone(self):
        if self.signum is not None:
            raise Interrupted(self.signum)


def leave_signals(worker):
    """For a data loader's workers: what asks them all to end, as ctrl-C does, is for the run to heed."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


@contextlib.contextmanager
def only_run_in(folder):
    """Holds the folder for this run.

    Raises:
        InputError: another run holds it, or it can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise InputError(f"another run is writing to {folder}: wait for it, or give another OUTPUT_DIR") from None
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    with held:
        yield


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds besides weights, optimizer and schedule. Plain JSON."""

    settings: dict  # what would make the run another one if it changed
    step_size: int = 0  # questions in an optimizer step, over all micro-batches and processes
    epoch: int = 0  # the epoch under way; epoch 0 is what comes before training
    step: int = 0  # optimizer steps done in it
    loss_sum: float = 0.0  # over its answer tokens so far
    tokens: int = 0
    seconds: float = 0.0
    history: list = field(default_factory=list)  # a record an epoch
    best_epoch: int = 0  # 0: none yet
    answers_before: dict = field(default_factory=dict)  # {place: answer}
    answers_best: dict = field(default_factory=dict)
    left_out: list = field(default_factory=list)  # [place, reason] of examples whose picture broke during the run


class Checkpoints:
    """The checkpoints of a run, in a folder of OUTPUT_DIR: one whole one, and beside it the next while it is written.

    A checkpoint is a folder with `model.safetensors` and `optimizer.pt`, the text model's weights and the states of
    optimizer and schedule, `progress.json`, and `best.safetensors`, the weights of the best epoch so far: a hard link,
    which costs nothing. It is the same for any number of processes, sharded or not; only the main one touches it.
    """

    def __init__(self, output_dir):
        self.folder = output_dir / "checkpoints"

    def newest(self):
        """The newest whole checkpoint, or None."""
        return max(self.folder.glob("epoch-*"), default=None)

    def save(self, accelerator, model, optimizer, scheduler, progress, is_best):
        """Called by all processes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=accelerator.is_fsdp2)
        weights, state = get_state_dict(model, optimizer, options=options)
        if accelerator.is_main_process:
            self.write(weights, {"optimizer": state, "scheduler": scheduler.state_dict()}, progress, is_best)
        accelerator.wait_for_everyone()

    def write(self, weights, state, progress, is_best):
        before = self.newest()
        path = self.folder / f"epoch-{progress.epoch:04d}-step-{progress.step:08d}"
        if path == before:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as beside:
            beside.mkdir()
            save_file(weights, beside / "model.safetensors")
            torch.save(state, beside / "optimizer.pt")
            best = beside / "model.safetensors" if is_best else before and before / "best.safetensors"
            if best and best.exists():
                link(best, beside / "best.safetensors")
            (beside / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        for old in self.folder.iterdir():
            if old != path:
                remove(old)

    def load(self, accelerator, model, optimizer, scheduler):
        """Brings the newest checkpoint, if there is one, into what `accelerator.prepare` gave; called by all."""
        path = from_main(accelerator, self.newest)
        if path is None:
            return
        weights, state = {}, {"optimizer": {}, "scheduler": None}
        if accelerator.is_main_process:
            weights = load_file(path / "model.safetensors")
            state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        scheduler.load_state_dict(from_main(accelerator, lambda: state["scheduler"]))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
        set_model_state_dict(model, weights, options=options)
        if accelerator.num_processes == 1 and not accelerator.is_fsdp2:
            optimizer.load_state_dict(state["optimizer"])  # the other way holds a second state on the device meanwhile
        else:
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)

    def progress(self):
        """The progress that the newest checkpoint holds, as a dictionary; None without one."""
        newest = self.newest()
        return None if newest is None else json.loads((newest / "progress.json").read_text(encoding="utf-8"))

    def discard(self):
        """Removes all checkpoints; one that is half removed is none."""
        aside = self.folder.with_name(".checkpoints.part")
        if aside.exists():
            remove(aside)
        if self.folder.exists():
            self.folder.replace(aside)
            remove(aside)


def refuse_finished(output_dir, overwrite):
    """Raises InputError where the folder holds a finished model that may not be replaced."""
    is_finished = (output_dir / "config.json").exists() and not Checkpoints(output_dir).newest()
    if is_finished and not overwrite:
        raise InputError(f"{output_dir} holds a finished model: give another OUTPUT_DIR or --overwrite true")


def link(source, target):
    """A second name for a file; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def move_into(source, target, last):
    """Moves the files of folder `source` into `target`; of these `last`, without which they count for nothing, last."""
    (target / last).unlink(missing_ok=True)
    sync(target)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        destination = target / file.name
        if destination.is_dir():
            remove(destination)
        Path(file).replace(destination)
    sync(target)
    source.rmdir()


def digest(dataset):
    """A name for what a dataset's examples say, wherever its files lie."""
    lines = "\n".join(json.dumps([each.picture, each.question, each.answer]) for each in dataset.examples)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def settings_of(constants, may_change, train, valid, vision_encoder):
    """What makes a run this run: with any of it changed, a checkpoint can't be gone on from."""
    settings = {name.upper(): value for name, value in vars(constants).items() if name.upper() not in may_change}
    settings.update(TRAIN_FILE=digest(train), VALID_FILE=digest(valid), vision_encoder=vision_encoder)
    in_step = settings.pop("BATCH_SIZE") * settings.pop("GRAD_ACCUM_STEPS")  # however they are cut
    settings["BATCH_SIZE x GRAD_ACCUM_STEPS"] = in_step
    if constants.lr_schedule != "constant":
        settings["EPOCHS"] = constants.epochs
    return json.loads(json.dumps(settings))  # as it comes back from a checkpoint


def resume_or_start(checkpoints, settings, step_size, overwrite):
    """The progress to go on from, or a new one of `step_size` questions a step.

    Raises:
        InputError: the checkpoint is of another run, and may not be discarded.
    """
    saved = checkpoints.progress()
    if saved is None:
        return Progress(settings, step_size)
    names = sorted(settings.keys() | saved["settings"].keys())
    changed = {name: (saved["settings"].get(name), settings.get(name)) for name in names}
    changed = [f"{name} was {was}, is {now}" for name, (was, now) in changed.items() if was != now]
    if not changed:
        print(f"Going on in epoch {saved['epoch']} after step {saved['step']}, from {checkpoints.newest()}")
        return Progress(**saved)
    if not overwrite:
        raise InputError(
            f"{checkpoints.folder} is of a run with other settings ({'; '.join(changed)}): "
            "give another OUTPUT_DIR, or discard that run by --overwrite true"
        )
    checkpoints.discard()
    return Progress(settings, step_size)
