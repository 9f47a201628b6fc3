"""What makes a run survive: checkpoints to go on from, and signals that end it at a safe place."""

import contextlib
import copy
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from moondream2.cli import InputError
from moondream2.files import is_finite, name_of_unfinished, remove, remove_whole, to_json, write_text, write_whole
from moondream2.launch import any_true, from_main, union, whole_state, with_heartbeat
from moondream2.machine import free_memory
from moondream2.modeling_moondream2 import Answer

VERSION = 3  # of what a checkpoint holds
WAY_OUT = ": give another OUTPUT_DIR, or discard that run by --overwrite true"
CHECKPOINT = re.compile(r"epoch-\d{6}-step-\d{8}")
BEST = re.compile(r"best-epoch-\d{6}\.safetensors")
ROOM = 2 << 30  # bytes of the host's memory that a copy leaves free


class Interrupted(Exception):
    """The process was asked to end."""

    def __init__(self, signum):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """Within it the first SIGINT or SIGTERM is a wish that is heeded at a safe place; the second ends at once.

    Of several processes each is sent the signal by the terminal and again by the launcher: there a second one is not
    more than the first, and the launcher ends what takes too long.
    """

    def __init__(self, accelerator):
        self.accelerator, self.signum = accelerator, None

    def __enter__(self):
        self.handlers = {each: signal.signal(each, self.ask) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def ask(self, signum, frame):
        is_first, is_alone = self.signum is None, self.accelerator.num_processes == 1
        self.signum = signum
        if is_alone:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
        if is_first:
            end = " Once more ends at once." if is_alone else ""
            print(f"\n{signal.Signals(signum).name}: finishing the step.{end}", flush=True)

    def check(self, due=False):
        """Whether something is `due` in any process; each of them stops where one was asked to. Called by all."""
        return self.heed(*any_true(self.accelerator, *self.wishes(due)))

    def wishes(self, due=False):
        """What processes exchange before they `heed` it: whether this one was asked to stop, and what is `due`."""
        return self.signum is not None, due

    def heed(self, asked, due):
        """What `check` does, of wishes that were exchanged; whoever is alone needs no exchange."""
        if asked or (self.signum is not None and self.accelerator.num_processes == 1):
            raise Interrupted(self.signum or signal.SIGTERM)
        return due

    def heeded(self, batches):
        """The batches of a pass that can't be gone on from, which ends where one was asked to stop; called by all."""
        for number, batch in enumerate(batches):
            if self.accelerator.num_processes == 1 or number % 16 == 0:  # to agree, processes wait for their devices
                self.check()
            yield batch

    def together(self, batches):
        """The batches of work that takes some processes longer than others: who is done first waits; called by all."""
        for batch in batches:
            self.check(due=True)
            yield batch
        while self.accelerator.num_processes > 1 and self.check():
            pass

    def check_alone(self):
        """`check` for work that each process does at its own pace."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds besides weights, optimizer and schedule. Plain JSON."""

    settings: dict  # what would make the run another one if it changed
    step_size: int = 0  # questions in an optimizer step, over all micro-batches and processes
    epoch: int = 0  # the epoch under way; epoch 0 is what comes before training
    step: int = 0  # optimizer steps done in it
    total_steps: int = 0  # optimizer steps done in the whole run
    learning_rate: float | None = None  # of the last of them
    loss_sum: float = 0.0  # over its answer tokens so far
    tokens: int = 0
    seconds: float = 0.0
    history: list = field(default_factory=list)  # a record an epoch
    best_epoch: int = 0  # 0: none yet
    answers_before: dict = field(default_factory=dict)  # {key of an example: Answer}
    answers_best: dict = field(default_factory=dict)
    test_before: dict = field(default_factory=dict)  # the same of the test file
    test_best: dict = field(default_factory=dict)  # given once, by the weights that are saved
    left_out: list = field(default_factory=list)  # (source, reason) of examples whose picture broke during the run
    tracker_id: str = field(default_factory=lambda: secrets.token_hex(8))  # the run's name for a tracker

    def __post_init__(self):
        for answers in (self.answers_before, self.answers_best, self.test_before, self.test_best):  # lists in JSON
            answers.update((key, Answer(*answer)) for key, answer in answers.items())
        self.left_out = [*map(tuple, self.left_out)]

    def share_left_out(self):
        """Each process has met other pictures: all learn which examples fell out."""
        self.left_out = union(self.left_out)

    def goes_on(self, epochs, patience):
        """Whether an epoch is still to be trained or judged; says so where patience has come to its end."""
        if self.is_tested and self.epoch <= epochs:
            print(f"The test file has been answered by epoch {self.best_epoch}'s weights: no more epochs are trained.")
        if self.epoch > epochs or self.is_tested:
            return False
        waited = self.epoch - 1 - self.best_epoch
        if not self.best_epoch or patience is None or waited < patience:
            return True
        print(f"No better validation loss for {waited} epochs: stopping early.")
        return False

    def end_epoch(self, record):
        """Enters an epoch's record into the history; the next one begins."""
        self.history.append(record)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.tokens, self.seconds = 0.0, 0, 0.0

    def is_best(self, valid_loss):
        """Whether a validation loss is lower than that of every epoch trained before; one not finite never is."""
        before = [record["valid_loss"] for record in self.history if record["epoch"]]
        return is_finite(valid_loss) and all(valid_loss < loss for loss in before if is_finite(loss))

    def enter_test(self, loss, accuracy, answers):
        """Enters what came of the test file into the record of the epoch that answered it: the best, or 0 before it.

        Returns:
            the record.
        """
        if self.best_epoch:
            self.test_best = answers
        else:
            self.test_before = answers
        record = self.history[self.best_epoch]
        record.update(test_loss=loss if is_finite(loss) else None, test_accuracy=accuracy)
        return record

    @property
    def is_tested(self):
        """Whether the test file was answered by the weights that are saved; it has no say, so training is over then."""
        return self.best_epoch > 0 and "test_loss" in self.history[self.best_epoch]

    @property
    def is_at_best(self):
        """Whether no step was done since the end of the best epoch."""
        return self.step == 0 and 0 < self.best_epoch == self.epoch - 1

    def require_best(self):
        """Raises InputError where no epoch was the best, so that there is no model to save."""
        if not self.best_epoch:
            raise InputError(
                "no epoch had a finite validation loss, so no model is saved: "
                "try a lower LEARNING_RATE with --overwrite true"
            )


class Checkpoints:
    """The checkpoints of a run, in a folder of OUTPUT_DIR: one whole one, and beside it the next while it is written.

    A checkpoint is a folder with `model.safetensors` and `optimizer.pt`, the weights that are trained and the states of
    optimizer and schedule, `progress.json`, and `best.safetensors`, the weights of the best epoch until there: a hard
    link, which costs nothing. It is the same for any number of processes, sharded or not; only the main one touches it.

    A best epoch that has ended since lies beside it as `best-epoch-000003.safetensors` until the next checkpoint links
    it. A run that goes on from a checkpoint comes to such an epoch anew, and removes what is of its future.

    On a card all is written by a thread, from a copy in the host's memory, while training goes on. One is written at a
    time; what went wrong is raised by the next `is_due`, `save` or `save_best`. A run that ends waits for the rest.
    """

    def __init__(self, output_dir):
        self.output_dir, self.folder = output_dir, output_dir.path / "checkpoints"
        self.thread, self.writing = ThreadPoolExecutor(1), None  # what it writes: a Future

    def watch(self, accelerator, model, optimizer, scheduler):
        """Says what is saved and loaded: what `accelerator.prepare` gave, and the schedule."""
        self.accelerator, self.model, self.optimizer, self.scheduler = accelerator, model, optimizer, scheduler
        self.saved_at = time.monotonic()

    def newest(self):
        """The path of the newest whole checkpoint, or None."""
        return max(self.all(), default=None)

    def all(self):
        paths = self.folder.iterdir() if self.folder.is_dir() else []
        return [path for path in paths if CHECKPOINT.fullmatch(path.name)]

    def is_due(self, minutes):
        """Whether the last one was saved, or the run began, so many minutes ago."""
        if self.writing and self.writing.done():
            self.join()
        return time.monotonic() - self.saved_at >= 60 * minutes

    def save(self, progress, at_once=False):
        """Saves where the run stands; returns when that is done if it is to be `at_once`. Called by all processes."""
        progress.share_left_out()
        if from_main(self.accelerator, self.is_saved, progress):
            return
        weights, scaler = self.weights(), self.accelerator.scaler
        state = {"optimizer": None, "scheduler": self.scheduler.state_dict(), "scaler": scaler and scaler.state_dict()}
        if self.optimizer.state:  # asked for its state before it has one, torch makes one by a step, which is counted
            options = StateDictOptions(full_state_dict=True, cpu_offload=self.accelerator.is_fsdp2)
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        from_main(self.accelerator, self.keep, self.write, (progress, weights, state), at_once)
        self.saved_at = time.monotonic()

    def save_best(self, progress):
        """Saves the weights of the best epoch, which has just ended. Called by all processes."""
        from_main(self.accelerator, self.join)
        from_main(self.accelerator, self.keep, self.write_best, (progress.best_epoch, self.weights()))

    def weights(self):
        """{name: tensor} of what is trained; in the main process whole. Called by all processes."""
        return whole_state(self.accelerator, self.model, ignore_frozen_params=True)

    def join(self):
        """Waits for what is being written; raises what went wrong with it."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def is_saved(self, progress):
        self.join()
        return self.newest() == self.path_of(progress)

    def path_of(self, progress):
        return self.folder / f"epoch-{progress.epoch:06d}-step-{progress.step:08d}"

    def path_of_best(self, epoch):
        return self.folder / f"best-epoch-{epoch:06d}.safetensors"

    def keep(self, write, what, at_once=False):
        """Writes it at once, or a copy of it, which training doesn't change, while training goes on."""
        device = self.accelerator.device.type
        self.output_dir.own(self.folder.name).mkdir(exist_ok=True)
        if at_once or not self.in_background(bytes_on(device, what)):
            write(*what)
        else:
            self.writing = self.thread.submit(write, *copy_of(device, what))

    def in_background(self, size):
        """Whether training goes on meanwhile: on a card, where the host's memory has room for a copy of that size."""
        return self.accelerator.device.type == "cuda" and size + ROOM <= free_memory()

    def write(self, progress, weights, state):
        path = self.path_of(progress)
        with write_whole(path) as beside:
            beside.mkdir()
            best, model = beside / "best.safetensors", beside / "model.safetensors"
            if progress.best_epoch:
                newer = self.path_of_best(progress.best_epoch)
                link(newer if newer.exists() else self.newest() / best.name, best)
            if progress.is_at_best:
                link(best, model)
            else:
                save_file(weights, model)
            torch.save(state, beside / "optimizer.pt")
            (beside / "progress.json").write_text(text_of(progress), encoding="utf-8")
        self.remove_all_but(path)

    def write_best(self, epoch, weights):
        """Puts it beside the newest checkpoint, not flushed: a run that dies goes on from there and won't read it."""
        self.remove_all_but(self.newest())
        with write_whole(self.path_of_best(epoch), durable=False) as beside:
            save_file(weights, beside)

    def save_test(self, progress):
        """Saves what came of the test file into the newest checkpoint, whose weights stay what they are."""
        write_text(self.newest() / "progress.json", text_of(progress))

    @contextlib.contextmanager
    def saved_at_the_end(self, progress):
        """Within it a run is trained, which leaves a checkpoint; one that is stopped, too, once training has begun."""
        with self.thread:  # whatever ends the run, what is being written is written
            try:
                yield
            except Interrupted:
                if progress.total_steps:
                    self.save(progress, at_once=True)
                raise
            self.save(progress, at_once=True)

    def load(self):
        """Brings the newest checkpoint, if there is one, into what is watched; called by all processes."""
        path = from_main(self.accelerator, self.newest)
        if path is None:
            return
        is_main = self.accelerator.is_main_process
        weights, state = with_heartbeat(self.accelerator, is_main, read_states, path) or ({}, {})
        scheduler, scaler, is_stepped = from_main(
            self.accelerator, lambda: (state["scheduler"], state.get("scaler"), bool(state["optimizer"]))
        )
        self.scheduler.load_state_dict(scheduler)
        if scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)
        options = self.to_load()
        set_model_state_dict(self.model, weights, options=options)
        if not is_stepped:
            return
        if self.accelerator.num_processes == 1 and not self.accelerator.is_fsdp2:
            self.optimizer.load_state_dict(state["optimizer"])  # the other way holds a second state meanwhile
        else:
            set_optimizer_state_dict(self.model, self.optimizer, state.get("optimizer", {}), options=options)

    def to_load(self):
        """How states are brought in: the main process has them, whole; none of what is frozen."""
        is_whole = all(p.requires_grad for p in self.model.parameters())
        several = self.accelerator.num_processes > 1
        return StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=is_whole)

    def load_best(self):
        """Brings the weights of the best epoch into what is watched; called by all processes."""
        is_main = self.accelerator.is_main_process
        weights = with_heartbeat(self.accelerator, is_main, self.best_weights) or {}
        set_model_state_dict(self.model, weights, options=self.to_load())

    def progress(self):
        """The Progress of the newest checkpoint.

        Raises:
            InputError: another version of this script wrote it.
        """
        saved = json.loads((self.newest() / "progress.json").read_text(encoding="utf-8"))
        if saved.pop("version", None) != VERSION or saved.keys() != {each.name for each in fields(Progress)}:
            raise InputError(f"{self.newest()} was written by another version of this script")
        return Progress(**saved)

    def best_weights(self):
        """{name: tensor}, the best epoch's weights of the text model; with LORA_RANK its adapters'."""
        return load_file(self.newest() / "best.safetensors")

    def discard(self):
        """Removes all checkpoints, and their folder where nothing else is in it."""
        self.remove_all_but(None)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def remove_all_but(self, path):
        """Removes the other checkpoints, the oldest first, best epochs beside them, and what a run that died left."""
        for old in sorted(self.all()):
            if old != path:
                remove_whole(old)
        for file in list(self.folder.glob("*")):
            name = name_of_unfinished(file.name)
            if BEST.fullmatch(name or file.name) or CHECKPOINT.fullmatch(name or ""):
                remove(file)

    def refuse_another_run(self, constants, may_change, datasets):
        """Raises InputError where the newest checkpoint is of another version or of a run with other settings.

        The vision encoder, which takes loading to be known, is not asked.
        """
        try:
            saved = self.progress().settings
            settings = settings_of(constants, may_change, datasets, saved["vision_encoder"])
            refuse_other_run(self, saved, settings)
        except InputError as error:
            raise InputError(f"{error}{WAY_OUT}") from None

    def refuse_finished(self, overwrite, is_look=False):
        """Raises InputError where a finished model may not be replaced; a look removes nothing."""
        if self.output_dir.holds_model() and not self.newest():
            if not is_look:
                self.discard()  # it may have died while it did
            if not overwrite:
                raise InputError(
                    f"{self.output_dir.path} holds a finished model: give another OUTPUT_DIR or --overwrite true"
                )


def text_of(progress):
    return to_json({"version": VERSION, **asdict(progress)})


def read_states(path):
    """The weights, and the states of optimizer and schedule, that a checkpoint holds."""
    state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    return load_file(path / "model.safetensors"), state


def bytes_on(device, value):
    """What the tensors on devices of that type take, in dictionaries and sequences."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.device.type == device else 0
    each = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(bytes_on(device, part) for part in each)


def copy_of(device, value):
    """A copy of all, tensors in the host's memory; what is not on a device of that type has been gathered into it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=value.device.type == device)
    if isinstance(value, dict):
        return {name: copy_of(device, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_of(device, part) for part in value)
    return copy.deepcopy(value)


def link(source, target):
    """A second name for a file; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def digest(dataset):
    """A name for what a dataset's examples say, wherever its files lie."""
    return hashlib.sha256("".join(example.key for example in dataset.examples).encode()).hexdigest()[:16]


def settings_of(constants, may_change, datasets, vision_encoder):
    """What makes a run this run: with any of it changed, a checkpoint can't be gone on from.

    Args:
        datasets: of training, validation and, if there is one, test.
    """
    settings = {name.upper(): value for name, value in vars(constants).items() if name.upper() not in may_change}
    settings |= zip(("TRAIN_FILE", "VALID_FILE", "TEST_FILE"), map(digest, datasets), strict=False)
    settings["vision_encoder"] = vision_encoder
    in_step = settings.pop("BATCH_SIZE") * settings.pop("GRAD_ACCUM_STEPS")  # however they are cut
    settings["BATCH_SIZE x GRAD_ACCUM_STEPS"] = in_step
    if constants.lr_schedule != "constant":
        settings["EPOCHS"] = constants.epochs
    return json.loads(json.dumps(settings))  # as it comes back from a checkpoint


def resume_or_start(checkpoints, settings, constants, processes):
    """The progress to go on from, or a new one, whose steps take BATCH_SIZE x GRAD_ACCUM_STEPS x processes questions.

    Raises:
        InputError: the checkpoint is of another run or another version, and may not be discarded.
    """
    new = Progress(settings, constants.batch_size * constants.grad_accum_steps * processes)
    path = checkpoints.newest()
    if path is None:
        checkpoints.discard()  # a run may have died behind a best epoch, and before its first checkpoint
        return new
    try:
        progress = checkpoints.progress()
        refuse_other_run(checkpoints, progress.settings, settings)
    except InputError as error:
        if not constants.overwrite:
            raise InputError(f"{error}{WAY_OUT}") from None
        checkpoints.discard()
        return new
    checkpoints.remove_all_but(path)
    print(f"Going on in epoch {progress.epoch} after step {progress.step}, from {path}")
    return progress


def refuse_other_run(checkpoints, saved, settings):
    names = sorted(name for name in settings.keys() | saved.keys() if saved.get(name) != settings.get(name))
    if names:
        changed = "; ".join(f"{name} was {saved.get(name)}, is {settings.get(name)}" for name in names)
        raise InputError(f"{checkpoints.folder} is of a run with other settings ({changed})")
