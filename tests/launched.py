"""What a process of a run notes down for the tests, and how it is made to train in float32 or sharded on a CPU."""

import json
import os
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

import finetune_moondream as script
from moondream2 import launch as processes

NOTES = {"steps": [], "encoded": 0, "rows": 0, "positions": 0}


def noting():
    """Notes each step's loss, gradient and tokens, and this process's own work."""
    load_model, train_step = script.load_model, script.train_step

    def load(*arguments):
        model = load_model(*arguments)
        model.vision_encoder.register_forward_pre_hook(lambda module, inputs: count(encoded=len(inputs[0])))
        return model

    def step(run, batches):
        for batch in batches:
            rows = len(batch["examples"])
            count(rows=rows, positions=batch["segments"].numel() if rows else 0)
        result = train_step(run, batches)
        NOTES["sharded"] = all(isinstance(p, DTensor) for p in run.text_model.parameters())
        NOTES["steps"].append(result)
        Path(os.environ["NOTES"]).write_text(json.dumps(NOTES))
        return result

    script.load_model, script.train_step = load, step


def in_bfloat16():
    """Notes, and trains as a user's run does."""
    torch.set_num_threads(1)
    noting()


def in_float32():
    """Notes, and trains in float32, in which equalities can be tested as such."""
    in_bfloat16()
    load_model = script.load_model
    script.load_model = lambda *arguments: load_model(*arguments).float()


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
    step = script.train_step

    def fail(run, batches):
        if run.accelerator.process_index == run.accelerator.num_processes - 1 and run.progress.step == 1:
            raise script.InputError("the disk of this machine caught fire")
        return step(run, batches)

    script.train_step = fail
