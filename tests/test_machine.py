"""What a run says that it runs on, under stand-ins for the machines that are not here."""

import os
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig

from moondream2 import ask, launch
from moondream2.cli import InputError
from moondream2.machine import free_memory, row_multiple, what_it_runs_on
from tests.child import Children
from tests.shared import TINY

CPU = torch.device("cpu")
SLOW = "a step of the full Moondream2 takes about a minute on two cores"


@pytest.fixture
def machine(monkeypatch):
    """`machine(card, major, count)`: a machine as torch reports it; 30 GiB of memory, 8 cores, no driver."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=30 << 30))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def stand_in(name="NVIDIA A10G", major=8, count=1):
        properties = SimpleNamespace(major=major, minor=0, total_memory=int(22.06 * 2**30), name=name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        AcceleratorState._reset_state(reset_partial_state=True)
        return torch.device("cuda")

    yield stand_in
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("count", "processes", "here", "line"),
    [
        (1, 1, 1, "Running on NVIDIA A10G, 22.1 GiB of memory"),
        (
            2,
            1,
            1,
            "Running on NVIDIA A10G, 22.1 GiB of memory; 1 more card is idle: "
            "accelerate launch --num_processes 2 finetune_moondream.py uses all",
        ),
        (
            4,
            1,
            1,
            "Running on NVIDIA A10G, 22.1 GiB of memory; 3 more cards are idle: "
            "accelerate launch --num_processes 4 finetune_moondream.py uses all",
        ),
        (4, 4, 4, "Running in 4 processes, the first on NVIDIA A10G, 22.1 GiB of memory"),
        (8, 16, 8, "Running in 16 processes, the first on NVIDIA A10G, 22.1 GiB of memory"),
        (
            4,
            2,
            2,
            "Running in 2 processes, the first on NVIDIA A10G, 22.1 GiB of memory; 2 more cards are idle: "
            "--num_processes takes one for each",
        ),
    ],
)
def test_of_cards_their_name_memory_and_number_are_told(machine, count, processes, here, line):
    assert what_it_runs_on(machine(count=count), processes, here) == line


def test_on_a_cpu_it_says_how_slow_that_is(machine):
    assert what_it_runs_on(CPU) == f"Running on the CPU, 8 cores, 30.0 GiB of memory: {SLOW}"


def test_a_card_that_torch_does_not_find_is_told_of(machine, monkeypatch):
    monkeypatch.setattr(shutil, "which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    in_vain = f"NVIDIA's driver is here, but torch {torch.__version__} finds no card: see docs/platforms.md"
    assert what_it_runs_on(CPU).endswith(f"{SLOW}; {in_vain}")
    machine()  # a card that is found, and not used as its user wishes
    assert what_it_runs_on(CPU).endswith(SLOW)


@pytest.mark.parametrize(("device", "name"), [("mps", "Apple's GPU (MPS)"), ("xpu", "xpu")])
def test_of_other_devices_it_says_that_none_was_tried(machine, device, name):
    assert what_it_runs_on(torch.device(device)) == (
        f"Running on {name}, 30.0 GiB of memory shared with the CPU; nothing was tried on one: "
        "with ACCELERATE_USE_CPU=true in the environment it runs on the CPU"
    )


@pytest.mark.parametrize(("name", "major"), [("Tesla T4", 7), ("Tesla V100-SXM2-16GB", 7), ("Tesla P100", 6)])
def test_a_card_without_bfloat16_ends_the_run_before_anything_is_fetched(
    machine, name, major, run_main, monkeypatch, tmp_path, capsys
):
    machine(name, major)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # by emulation
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *words, **flags: pytest.fail("it fetches"))
    with pytest.raises(InputError) as refused:
        run_main(model_id=TINY, output_dir=tmp_path / "out")
    assert str(refused.value) == (
        f"{name} has no bfloat16 of its own, in which every weight is trained: --lora_rank 16 trains adapters on it, "
        "in float16 (docs/small-cards.md); or take an NVIDIA card of the Ampere generation or newer (RTX 30, A10, "
        "A100, L4); with ACCELERATE_USE_CPU=true in the environment it runs on the CPU, slowly"
    )
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("major", "hip"), [(8, None), (9, None), (12, None), (7, "7.0")])
def test_a_card_with_bfloat16_trains(machine, major, hip, monkeypatch, capsys):
    machine(major=major)
    monkeypatch.setattr(torch.version, "hip", hip)  # AMD counts otherwise; torch says that all of its cards do
    assert launch.start().device.type == "cuda"
    assert capsys.readouterr().out == "Running on NVIDIA A10G, 22.1 GiB of memory\n"


def test_the_way_out_of_a_card_without_bfloat16_works(machine, monkeypatch, capsys):
    machine("Tesla T4", 7)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launch.start().device == CPU
    assert capsys.readouterr().out == f"Running on the CPU, 8 cores, 30.0 GiB of memory: {SLOW}\n"


def start_and_end():
    launch.end(launch.start())  # whoever leaves first takes the meeting place with it


def test_it_is_the_first_line_and_the_main_process_says_it(tmp_path):
    children = Children(2, start_and_end, tmp_path)
    assert children.wait() == [0, 0], "\n".join(child.text() for child in children)
    assert children[0].text().startswith("Running in 2 processes, the first on the CPU, ")
    assert children[1].text() == ""


def test_rows_are_padded_on_a_card_alone():
    assert [row_multiple(torch.device(kind)) for kind in ("cuda", "cpu", "mps")] == [64, 1, 1]


@pytest.mark.parametrize("begin", [launch.start, lambda: ask.load(TINY)], ids=["a run", "asking"])
@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_torch_is_set_up_for_rows_of_many_lengths(monkeypatch, begin, name):
    """Unless the user has set up its allocator, by the new name or the old."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(each, "")  # so that what is set here is undone
        monkeypatch.delenv(each)
    if name:
        monkeypatch.setenv(name, "backend:native")
    torch.backends.cuda.enable_cudnn_sdp(True)
    begin()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    set_to = {
        each: os.environ[each] for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if each in os.environ
    }
    assert set_to == ({name: "backend:native"} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def group(folder, limit):
    """The files in which Linux tells the limit of a group."""
    texts = {"max": str(limit), "current": "7", "stat": "anon 2\ninactive_file 5\n"}
    return {f"{folder}/memory.{name}": text for name, text in texts.items()}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 20),
        (group(".", "max"), 20),
        (group(".", 12), 10),
        (group("job/step", 12) | group("job", 14) | group(".", 16), 10),
        (group("job/step", "max") | group("job", 11), 9),
        (
            {
                "memory/memory.limit_in_bytes": "12",
                "memory/memory.usage_in_bytes": "7",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 4",
            },
            9,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "7",
                "memory/memory.stat": "total_inactive_file 4",
            },
            20,
        ),
    ],
    ids=[
        "no container",
        "cgroup 2, no limit",
        "cgroup 2",
        "a job's group",
        "around it",
        "cgroup 1",
        "cgroup 1, no limit",
    ],
)
def test_free_memory_is_no_more_than_the_limits_of_its_groups_leave(monkeypatch, tmp_path, files, free):
    """What it takes for files that were read goes when it is needed."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20))
    own = tmp_path / "own"
    assert free_memory(tmp_path, own) == 20  # another system than Linux
    own.write_text("9:name=systemd:/\n4:memory:/\n0::/job/step\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path, own) == free
