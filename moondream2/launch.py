"""What the processes of one run share out, gather and agree on. With a single process each of these is nothing."""

import contextlib
import importlib.util
import os
import time
from concurrent.futures import Future, wait
from datetime import timedelta
from threading import Thread

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from moondream2.cli import InputError
from moondream2.machine import set_up_torch, training_dtype, what_it_runs_on

TRACKED = "finetune_moondream"  # a tracker's project, and the folder that tensorboard fills in OUTPUT_DIR
TIMEOUT = timedelta(minutes=10)  # after which a process that does not answer counts as dead
LOSS_SCALE = 2.0**10  # at first, in float16: torch's 2**16 is for a mean, and the loss is a sum over answer tokens
HEARTBEAT = 0.2  # seconds between two signs of life while one process works and the others wait for it
LOST = (  # what a process is told whose partner ended, or did not answer in time
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "Application timeout",
)


def start(tracker=None, folder=None, lora_rank=None):
    """The Accelerator of this process, which has met the others; a tracker that writes files does so in `folder`.

    The main process says what the run runs on.

    Raises:
        InputError: they were launched in a way that this script doesn't train in, or on a card that it doesn't train
            on, or the tracker is not installed.
    """
    refuse_missing_tracker(tracker)
    set_up_torch()
    in_buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # a second copy only while several add up
    handlers = [in_buckets, InitProcessGroupKwargs(timeout=TIMEOUT)]
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers, log_with=tracker, project_dir=folder)
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
    if training_dtype(accelerator.device, lora_rank) == torch.float16:  # whose smallest gradients would be 0
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=LOSS_SCALE)
    if accelerator.is_main_process:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        print(what_it_runs_on(accelerator.device, accelerator.num_processes, here), flush=True)
    return accelerator


def refuse_missing_tracker(tracker):
    """Raises InputError where the tracker is not installed."""
    if tracker and not importlib.util.find_spec(tracker):
        raise InputError(f"TRACKER {tracker!r} needs its package: pip install {tracker}")


def start_tracker(accelerator, constants, progress):
    """Starts the tracker, if there is one, and tells it the constants; a run that goes on also goes on in it.

    What a run logged behind its last checkpoint, it logs again; tensorboard forgets the first time.
    """
    steps = progress.total_steps
    arguments = {
        "tensorboard": {"purge_step": steps + 1 if steps else 0},
        "wandb": {"id": progress.tracker_id, "resume": "allow"},
        "trackio": {"name": progress.tracker_id, "resume": "allow"},
    }
    if constants.tracker is not None:
        config = None if steps else {name: str(value) for name, value in vars(constants).items()}
        accelerator.init_trackers(TRACKED, config, {constants.tracker: arguments[constants.tracker]})


def end(accelerator):
    """Waits for the other processes, and ends the exchange with them and the tracker."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # A thread of gloo may still wait for Python's lock to let go of the last tensors. Whoever takes the process
        # group apart holds that lock and waits for the thread: for ever, if it is not given a moment before.
        time.sleep(0.2)
    accelerator.end_training()


@contextlib.contextmanager
def one_speaks(accelerator):
    """What is printed comes from the main process; warnings and errors, which go to stderr, from each.

    Raises:
        InputError: another process ended, which has said why, or answers no more.
    """
    with contextlib.ExitStack() as stack:
        if not accelerator.is_main_process:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            if transformers.utils.logging.is_progress_bar_enabled():
                transformers.utils.logging.disable_progress_bar()
                stack.callback(transformers.utils.logging.enable_progress_bar)
        try:
            yield
        except RuntimeError as error:
            if accelerator.num_processes == 1 or not any(words in str(error) for words in LOST):
                raise
            raise InputError(f"process {accelerator.process_index} ends because another process did") from None


def from_main(accelerator, function, *arguments):
    """What `function` returns in the main process, given to all; only there it is called."""
    result = with_heartbeat(accelerator, accelerator.is_main_process, function, *arguments)
    return broadcast_object_list([result])[0]


def first_on_each_machine(accelerator, function, *arguments):
    """What `function` returns; one process of each machine calls it first, and fetches what the others find there."""
    is_first = accelerator.is_local_main_process
    first = with_heartbeat(accelerator, is_first, function, *arguments)
    other = with_heartbeat(accelerator, not is_first, function, *arguments)
    return first if is_first else other


def with_heartbeat(accelerator, is_called, function, *arguments):
    """What `function` returns in the processes where it `is_called`, None in the others; it may take its time.

    Processes give each other up after TIMEOUT. So a thread calls the function, and meanwhile all of them exchange
    whether it still works somewhere.
    """
    if accelerator.num_processes == 1:
        return function(*arguments) if is_called else None
    result, works = None, is_called
    future = in_thread(function, *arguments) if is_called else None
    while any_true(accelerator, works)[0]:
        if works:
            wait([future], HEARTBEAT)
            if future.done():
                result, works = future.result(), False
    return result


def in_thread(function, *arguments):
    """The Future of a call. A process that ends does not wait for it, as it would for an executor's."""
    future = Future()

    def call():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    Thread(target=call, daemon=True).start()
    return future


def whole_state(accelerator, model, **options):
    """The weights of what `accelerator.prepare` gave, {name: tensor}; sharded ones whole, in the main process alone."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=accelerator.is_fsdp2, **options)
    return get_model_state_dict(model, options=options)


def gather(items):
    """The items of all processes' lists in one list."""
    return gather_object(items)


def union(items):
    """The items of all processes' lists in one list, the same one once."""
    return list(dict.fromkeys(gather(items)))


def own_batches(accelerator, batches):
    """This process's batches: as many for each, with empty ones at the end, so that all keep step."""
    processes = accelerator.num_processes
    return (batches + [[]] * (-len(batches) % processes))[accelerator.process_index :: processes]


def any_true(accelerator, *flags):
    """For each flag, whether it is true in any process."""
    if accelerator.num_processes == 1:
        return list(flags)
    return [count > 0 for count in accelerator.reduce(torch.tensor(flags, device=accelerator.device).float()).tolist()]


def sums(accelerator, tensor, *numbers):
    """The sums over all processes of a tensor without dimensions and of numbers, as tensors on its device.

    One exchange, whose result nobody waits for here.
    """
    both = torch.stack([tensor, *(torch.full_like(tensor, number) for number in numbers)])
    return accelerator.reduce(both).unbind()


@contextlib.contextmanager
def whole_weights(model):
    """Within it a sharded model lies whole in each process, which can then use it at its own pace."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    text_model = model.text_model
    last = text_model, text_model.final_norm, text_model.get_output_embeddings()  # stay whole: backward begins there
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part not in last, recurse=False)
            part.reshard()
