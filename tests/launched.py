"""What a process of a run notes down for the tests, and how it is made to train in float32 or sharded on a CPU."""

import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

import finetune_moondream as script
from moondream2 import launch as processes
from moondream2.checkpoints import Checkpoints, Interrupted, Progress, Stop
from moondream2.cli import InputError
from moondream2.features import FeatureStore
from moondream2.pictures import PictureError

NOTES = {"steps": [], "encoded": 0, "rows": 0, "positions": 0, "reductions": 0, "gathers": 0}


def noting():
    """Notes each step's loss, gradient and tokens, and this process's own work.

    With WAITS in the environment it goes on behind the second step when a file `go` lies beside the notes.
    """
    load_model, train_steps, notes = script.load_model, script.train_steps, Path(os.environ["NOTES"])

    def load(*arguments):
        model = load_model(*arguments)
        model.vision_encoder.register_forward_pre_hook(lambda module, inputs: count(encoded=len(inputs[0])))
        return model

    def steps(engine, *arguments):
        for step in train_steps(engine, *arguments):
            while "WAITS" in os.environ and len(NOTES["steps"]) == 2 and not notes.with_name("go").exists():
                time.sleep(0.01)
            for batch in step.batches:
                rows = len(batch["rows"])
                count(rows=rows, positions=batch["document_ids"].numel() if rows else 0)
            NOTES["sharded"] = all(isinstance(p, DTensor) for p in engine.text_model.parameters())
            NOTES["steps"].append((step.loss, step.grad_norm, step.tokens))
            notes.write_text(json.dumps(NOTES))
            yield step

    script.load_model, script.train_steps = load, steps
    script.backward, script.update = (counting_exchanges(each) for each in (script.backward, script.update))


def counting_exchanges(function):
    """Counts what the function exchanges besides gradients, which torch exchanges by itself; gathered weights, too."""

    def counting(*arguments):
        names = {"all_reduce": "reductions", "all_gather_single": "gathers"}
        exchanges = {name: counted(getattr(torch.distributed, name), noted) for name, noted in names.items()}
        with patch.multiple(torch.distributed, **exchanges):
            return function(*arguments)

    return counting


def counted(function, name):
    return lambda *arguments, **words: (count(**{name: 1}), function(*arguments, **words))[1]


def in_bfloat16():
    """Notes, and trains as a user's run does."""
    torch.set_num_threads(1)
    noting()


def first_is_best():
    """Trains in float32, and keeps the first epoch whatever its validation loss is."""
    in_float32()
    Progress.is_best = lambda progress, loss: progress.epoch == 1


def sharded_and_first_is_best():
    first_is_best()
    shard()


def in_float32():
    """Notes, and trains in float32, in which equalities can be tested as such."""
    in_bfloat16()
    load_model = script.load_model
    script.load_model = lambda *arguments: load_model(*arguments).float()


def writing_in_background():
    """Checkpoints are written while training goes on, as on a card."""
    Checkpoints.in_background = lambda checkpoints, size: True


def signalled_while_it_writes():
    """In the background; the first checkpoint is not written before the run is asked to stop, and each is told of."""
    writing_in_background()
    write, ask, asked = Checkpoints.write, Stop.ask, threading.Event()

    def ask_and_write(stop, signum, frame):
        ask(stop, signum, frame)
        asked.set()

    def write_when_asked(checkpoints, *what):
        print("\nwriting", flush=True)
        asked.wait()
        time.sleep(0.5)
        write(checkpoints, *what)
        print("\nwritten", flush=True)

    Checkpoints.write, Stop.ask = write_when_asked, ask_and_write


def main_writes_while_all_go_on():
    """One checkpoint, begun in the first step, is not written before three are done; notes how many were."""
    in_float32_writing_in_background()
    write, is_due, begun = Checkpoints.write, Checkpoints.is_due, []

    def once(checkpoints, minutes):
        is_due(checkpoints, minutes)
        begun.append(minutes)
        return len(begun) == 1

    def write_later(checkpoints, progress, *state):
        end = time.monotonic() + 60
        while not progress.step > 1 and len(NOTES["steps"]) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        NOTES.setdefault("steps_when_written", []).append((progress.step, len(NOTES["steps"])))
        write(checkpoints, progress, *state)

    Checkpoints.is_due, Checkpoints.write = once, write_later


def in_float32_writing_in_background():
    in_float32()
    writing_in_background()


def count(**more):
    for name, value in more.items():
        NOTES[name] += value


def sharded():
    in_float32()
    shard()


def sharded_in_bfloat16():
    in_bfloat16()
    shard()


def shard():
    """FSDP of `fsdp.yaml`. On CPU processes accelerate gives DDP whatever is asked for, so its mind is changed here."""
    accelerator_class = processes.Accelerator

    def accelerator(**arguments):
        made = accelerator_class(**arguments)
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()  # by its variables
        return made

    processes.Accelerator = accelerator


def variables_of(config_file):
    """The environment that `accelerate launch --config_file` gives its processes."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(config_file), "--num_processes", "2", "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    names = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in names.items() if name.startswith(("FSDP", "ACCELERATE"))}


def failing():
    """The last process fails in its second step."""
    in_float32()
    backward = script.backward

    def fail(engine, *arguments):
        accelerator = engine.accelerator
        if accelerator.process_index == accelerator.num_processes - 1 and len(NOTES["steps"]) == 1:
            raise script.InputError("the disk of this machine caught fire")
        return backward(engine, *arguments)

    script.backward = fail


def first_step_is_lost():
    """The first step's gradient is not finite, so it is not applied; in float32."""
    in_float32()
    backward, losses = processes.Accelerator.backward, []

    def first_is_nan(accelerator, loss, **arguments):
        losses.append(loss)
        backward(accelerator, loss * (float("nan") if len(losses) == 1 else 1), **arguments)

    processes.Accelerator.backward = first_is_nan
    return losses


def second_loses_a_picture():
    """The first picture that the second process reads is gone there from then on. Notes what checkpoints say of it."""
    in_float32()
    read, lost, write = FeatureStore.read, [], Checkpoints.write

    def fail(store, picture):
        lost[:] = lost or [picture.key]
        if os.environ["RANK"] == "1" and picture.key == lost[0]:
            raise PictureError("gone")
        return read(store, picture)

    def write_and_note(checkpoints, progress, *state):
        NOTES.setdefault("left_out_when_written", []).append((progress.epoch, len(progress.left_out)))
        write(checkpoints, progress, *state)

    FeatureStore.read, Checkpoints.write = fail, write_and_note


def stopped_before_it_is_applied():
    """The first step is lost, and the run stopped behind it."""
    losses, wishes = first_step_is_lost(), Stop.wishes

    def stop(self, due=False):
        self.signum = signal.SIGTERM if losses else None
        return wishes(self, due)

    Stop.wishes = stop


def sharded_and_stopped_before_it_is_applied():
    stopped_before_it_is_applied()
    shard()


# ---------------------------------------------------------------------------------------------------------------------
# Functions that are run in place of the script
# ---------------------------------------------------------------------------------------------------------------------


def note(*values):
    """Prints into this process's notes."""
    with Path(os.environ["NOTES"]).open("a") as file:
        print(*values, file=file)


def impatient():
    """A process that does not answer counts as dead after seconds."""
    in_float32()
    processes.TIMEOUT = timedelta(seconds=6)


def reading_for_long():
    """What is waited for longer than for a dead process: first in the main process, then in each."""
    processes.TIMEOUT = timedelta(seconds=4)

    def read(seconds):
        time.sleep(seconds)
        return ["read by", accelerator.process_index]

    accelerator = processes.start()
    with processes.one_speaks(accelerator):
        note(*processes.from_main(accelerator, read, 6))
        processes.with_heartbeat(accelerator, accelerator.process_index == 1, read, 6)
        note(processes.any_true(accelerator, False, accelerator.process_index == 1))


def fetching():
    """What each machine's first process fetches, the others find."""
    accelerator = processes.start()

    def fetch(file):
        if file.exists():
            return "found"
        time.sleep(1)
        file.touch()
        return "fetched"

    note(processes.first_on_each_machine(accelerator, fetch, Path(os.environ["NOTES"]).with_name("fetched")))
    alone = accelerator.num_processes == 1
    note(processes.from_main(accelerator, lambda: threading.current_thread() is threading.main_thread()) is alone)


def reading_in_vain():
    """The main process meets what its user can mend while the other still works."""
    accelerator = processes.start()

    def read():
        if accelerator.is_main_process:
            raise InputError("train.jsonl:1 is no JSON")
        time.sleep(1000)

    with processes.one_speaks(accelerator):
        processes.with_heartbeat(accelerator, True, read)


def agreeing():
    """Checks, in which only the last process has something due, and then is asked to stop."""
    accelerator = processes.start()
    is_last = accelerator.process_index == accelerator.num_processes - 1
    with Stop(accelerator) as stop:
        note(stop.check(), stop.check(due=is_last), stop.check(due=True), stop.check())
        reductions, reduce = [], accelerator.reduce
        accelerator.reduce = lambda *arguments: reductions.append(1) or reduce(*arguments)
        stop.signum = signal.SIGTERM if is_last else None
        try:
            stop.check(due=True)
        except Interrupted as interrupted:
            note(interrupted, len(reductions))
