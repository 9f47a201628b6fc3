"""What the processes of one run share out, gather and agree on. With a single process each of these is nothing."""

import contextlib
import os
from datetime import timedelta

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed.fsdp import FSDPModule

from moondream2.cli import InputError

LONGEST_WAIT = timedelta(hours=6)  # for one that fetches the model or reads the data; a dead one is noticed at once
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def start(**arguments):
    """The Accelerator of this process, which has met the others.

    Raises:
        InputError: they were launched in a way that this script doesn't train in.
    """
    in_buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # which are not a second copy then
    handlers = [in_buckets, InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers, **arguments)
    accelerator.gradient_accumulation_steps = 1  # the script's own, whatever the launch says: it counts tokens
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise InputError(
            f"launched for {kind.value}: several GPUs train by DDP, or by FSDP with --config_file moondream2/fsdp.yaml"
        )
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            raise InputError(
                "this FSDP configuration is not one that the run is made for: use --config_file moondream2/fsdp.yaml"
            )
    return accelerator


@contextlib.contextmanager
def one_speaks(accelerator):
    """What is printed comes from the main process; warnings and errors, which go to stderr, from each.

    Raises:
        InputError: another process ended, which has said why.
    """
    with contextlib.ExitStack() as stack:
        if not accelerator.is_main_process:
            nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            transformers.utils.logging.disable_progress_bar()
        try:
            yield
        except RuntimeError as error:
            if accelerator.num_processes == 1 or not any(words in str(error) for words in LOST):
                raise
            raise InputError(f"process {accelerator.process_index} ends because another process did") from None


def from_main(accelerator, function, *arguments):
    """What `function` returns in the main process, given to all; only there it is called."""
    result = [function(*arguments) if accelerator.is_main_process else None]
    return broadcast_object_list(result)[0]


def gather(items):
    """The items of all processes' lists in one list."""
    return gather_object(items)


def share(accelerator, batches):
    """This process's batches: as many for each, with empty ones at the end, so that all keep step."""
    processes = accelerator.num_processes
    return (batches + [[]] * (-len(batches) % processes))[accelerator.process_index :: processes]


def any_says(accelerator, flag):
    """Whether `flag` is true in any process."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0


@contextlib.contextmanager
def whole_weights(model):
    """Within it a sharded model lies whole in each process, which can then use it at its own pace."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
