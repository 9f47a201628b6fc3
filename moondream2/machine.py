"""What a run runs on: its first line says it, and a card that lacks bfloat16 ends it there, or trains adapters."""

import os
import shutil
from pathlib import Path, PurePosixPath

import psutil
import torch

from moondream2.cli import InputError

LIMITS = (  # a group's limit, what it takes, and what of that are files read, which go when needed: cgroup 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
OTHERS = {"mps": "Apple's GPU (MPS)"}  # than NVIDIA's, AMD's and the CPU; no run was ever tried on one
ON_CPU = "with ACCELERATE_USE_CPU=true in the environment it runs on the CPU"


def set_up_torch():
    """Settings for rows of many lengths, made before anything is on a card; what the user has set stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # or many lengths would leave many small holes
    # cuDNN's attention, which comes first on an H100, plans anew for each length, for up to a second, and its backward
    # pass in bfloat16 is known to give NaN.
    torch.backends.cuda.enable_cudnn_sdp(False)


def row_multiple(device):
    """A row's positions are padded to a multiple of this.

    On a card few shapes are worth some 4% more positions: kernels are chosen, planned and compiled for each shape, and
    want masks of aligned rows. On a CPU positions are all that costs.
    """
    return 64 if device.type == "cuda" else 1


def lacks_bfloat16(device):
    """Whether it is a card without bfloat16 of its own."""
    # Unless told otherwise torch also counts cards that only emulate it.
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def training_dtype(device, lora_rank):
    """The type in which a run computes: bfloat16; with adapters, on a card that lacks it, float16.

    Raises:
        InputError: every weight is to be trained on such a card.
    """
    if not lacks_bfloat16(device):
        return torch.bfloat16
    if lora_rank is None:
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16 of its own, in which every weight is trained: "
            "--lora_rank 16 trains adapters on it, in float16 (docs/small-cards.md); or take an NVIDIA card of the "
            f"Ampere generation or newer (RTX 30, A10, A100, L4); {ON_CPU}, slowly"
        )
    return torch.float16


def what_it_runs_on(device, processes=1, on_this_machine=1):
    """A sentence about the device, the cards that are idle beside it, and how to use them.

    Args:
        device: of the main process.
        processes: how many the run has, and how many of them are `on_this_machine`.
    """
    where = "Running" if processes == 1 else f"Running in {processes} processes, the first"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        idle = torch.cuda.device_count() - on_this_machine
        return f"{where} on {torch.cuda.get_device_name(device)}, {gib(memory)}{idle_cards(idle, processes)}"
    memory = gib(psutil.virtual_memory().total)
    if device.type != "cpu":
        name = OTHERS.get(device.type, device.type)
        return f"{where} on {name}, {memory} shared with the CPU; nothing was tried on one: {ON_CPU}"
    slow = "a step of the full Moondream2 takes about a minute on two cores"
    return f"{where} on the CPU, {os.cpu_count()} cores, {memory}: {slow}{card_in_vain()}"


def idle_cards(idle, processes):
    if idle <= 0:
        return ""
    command = f"accelerate launch --num_processes {idle + 1} finetune_moondream.py uses all"
    cards = f"{idle} more {'card is' if idle == 1 else 'cards are'} idle"
    return f"; {cards}: {command if processes == 1 else '--num_processes takes one for each'}"


def card_in_vain():
    """What to say on the CPU of a machine that has NVIDIA's driver."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    return f"; NVIDIA's driver is here, but torch {torch.__version__} finds no card: see docs/platforms.md"


def free_memory(groups=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """Bytes of the host's memory that a process may still take: of a container's or job's, what its limits leave.

    Args:
        groups: the folder in which Linux tells limits.
        own: the file that says in which folders below it those of this process lie.
    """
    free = psutil.virtual_memory().available
    for folder in folders_of(own):
        for limit, used, files in LIMITS:
            try:
                most, taken = (int(text_of(groups / folder / name)) for name in (limit, used))
                parts = dict(line.split() for line in text_of(groups / folder / "memory.stat").splitlines())
            except (OSError, ValueError):  # there is none
                continue
            free = min(free, most - taken + int(parts[files]))
    return free


def folders_of(own):
    """The folders, each below that of all groups, whose limits count for a process: its own and those around it."""
    try:
        lines = [line.split(":", 2) for line in text_of(own).splitlines()]
    except OSError:  # another system than Linux
        return
    for _, controllers, path in lines:
        if controllers in ("", "memory"):  # cgroup 2, cgroup 1
            path = PurePosixPath(path)
            yield from (PurePosixPath(controllers, *each.parts[1:]) for each in (path, *path.parents))


def text_of(file):
    return file.read_text(encoding="utf-8")


def gib(size):
    return f"{size / 2**30:.1f} GiB of memory"
