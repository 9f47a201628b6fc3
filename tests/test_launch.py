"""Several processes train as one: over gloo on this machine's CPU, from data to the saved model."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from moondream2 import launch
from moondream2.checkpoints import Progress
from tests import scaling
from tests.child import Child, Children
from tests.launched import (
    agreeing,
    failing,
    fetching,
    first_is_best,
    first_step_is_lost,
    impatient,
    in_bfloat16,
    in_float32,
    in_float32_writing_in_background,
    main_writes_while_all_go_on,
    reading_for_long,
    reading_in_vain,
    second_loses_a_picture,
    sharded,
    sharded_and_first_is_best,
    sharded_and_stopped_before_it_is_applied,
    sharded_in_bfloat16,
    stopped_before_it_is_applied,
    variables_of,
)
from tests.shared import ROOT, TINY, TINY_2025, untimed

slow = pytest.mark.slow


@pytest.fixture
def flags(data, tmp_path, smallest):
    return {
        "model_id": smallest[TINY],
        "train_file": data / "train.jsonl",
        "valid_file": data / "valid.jsonl",
        "features_dir": tmp_path / "features",
        "output_dir": tmp_path / "out",
        "epochs": 2,
        "batch_size": 2,
        "learning_rate": 1e-4,
        "valid_answers": 5,
    }


def trained(processes, flags, folder, setup=in_float32, **changes):
    """A whole run in so many processes; what each of them noted."""
    flags = {**flags, "output_dir": folder / "out", "features_dir": folder / "features", **changes}
    children = Children(processes, flags, folder, setup, **environment(setup))
    assert children.wait() == [0] * processes, "\n".join(child.text() for child in children)
    return notes(folder, processes)


def environment(setup):
    return variables_of(ROOT / "moondream2" / "fsdp.yaml") if setup.__name__.startswith("sharded") else {}


def stopped(processes, flags, folder, setup, rank):
    """A run in so many processes, ended by SIGTERM to one of them in its first steps."""
    children = Children(processes, flags, folder, setup, WAITS="", **environment(setup))
    wait_for(lambda: "Before training" in children[0].text(), children)
    os.kill(children[rank].process.pid, signal.SIGTERM)
    (folder / "go").touch()
    assert children.wait(60) == [128 + signal.SIGTERM] * processes, "\n".join(child.text() for child in children)


def notes(folder, processes):
    return [json.loads((folder / f"notes{rank}.json").read_text()) for rank in range(processes)]


def log_of(folder):
    records = [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]
    return [untimed(record) for record in records]


def difference(name, tensor, expected):
    """Relative. A key's bias moves no softmax: its gradient is rounding noise, which AdamW makes full steps of."""
    if name.endswith(("Wqkv.bias", "attn.qkv.bias")):
        tensor, expected = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (tensor, expected))
    return (tensor - expected).norm() / expected.norm().clamp(min=1e-12)


def assert_same_training(one, several, folder_one, folder_several, base):
    """Losses by step and validation of two runs within 1e-5 relative, final weights within 2e-5; an exchange a step."""
    assert one["reductions"] == 0
    for noted in several:
        assert noted["reductions"] == len(noted["steps"])
        assert len(noted["steps"]) == len(one["steps"])
        for (loss, norm, tokens), (expected_loss, expected_norm, expected_tokens) in zip(
            noted["steps"], one["steps"], strict=True
        ):
            assert tokens == expected_tokens
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
    weights, expected = (load_file(folder / "out" / "model.safetensors") for folder in (folder_several, folder_one))
    base = load_file(base / "model.safetensors")
    assert weights.keys() == expected.keys() == base.keys()
    moved = 0.0
    for name, tensor in expected.items():
        assert difference(name, weights[name], tensor) <= 2e-5, name
        moved = max(moved, ((tensor - base[name]).norm() / tensor.norm().clamp(min=1e-6)).item())
    assert moved > 1e-3  # fifty times more than they may differ
    assert_same_log(folder_several, folder_one)


def answers_of(folder, name="predictions.jsonl"):
    lines = [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]
    return [(line["source"].split(":")[-1], line["question"], line["before"], line["after"]) for line in lines]


def assert_same_log(folder, expected):
    before, expected_before = log_of(folder)[0], log_of(expected)[0]
    loss, expected_loss = before.pop("valid_loss"), expected_before.pop("valid_loss")
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # nothing is trained yet, but a batch may have other rows
    assert before == expected_before
    for record, expected_record in zip(log_of(folder)[1:], log_of(expected)[1:], strict=True):
        assert record == pytest.approx(expected_record, rel=1e-5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Runs in one process by their questions a step, made when first asked for."""
    made = {}

    def run(flags, step_size, **changes):
        changes = {"model_id": flags["model_id"], **changes}
        key = (step_size, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("one")
            made[key] = folder, trained(1, flags, folder, batch_size=step_size, grad_accum_steps=1, **changes)[0]
        return made[key]

    return run


@pytest.mark.parametrize(
    ("processes", "batch_size", "accum", "changes", "release"),
    [
        (2, 2, 1, {}, TINY),  # 19 questions: 4 steps of 4, then 3 for two processes
        pytest.param(3, 2, 1, {}, TINY, marks=slow),  # 3 steps of 6, then 1 for three processes
        pytest.param(2, 1, 2, {}, TINY, marks=slow),
        (2, 2, 1, {"group_by_picture": "true", "gradient_checkpointing": "true"}, TINY),
        (2, 2, 1, {}, TINY_2025),
        (2, 2, 1, {"lora_rank": 4, "learning_rate": 1e-3, "epochs": 1}, TINY),
    ],
    ids=["two", "three", "two that accumulate", "two, checkpointed", "two, of 2025-06-21", "two, of adapters"],
)
def test_processes_train_as_one(flags, smallest, reference, tmp_path, processes, batch_size, accum, changes, release):
    flags["model_id"] = smallest[release]
    folder, one = reference(flags, processes * batch_size * accum, **changes)
    several = trained(processes, flags, tmp_path, batch_size=batch_size, grad_accum_steps=accum, **changes)
    assert_same_training(one, several, folder, tmp_path, flags["model_id"])
    assert sum(each["encoded"] for each in several) == one["encoded"] == 11
    assert answers_of(tmp_path) == answers_of(folder)


@pytest.mark.parametrize(
    "setup", [first_is_best, pytest.param(sharded_and_first_is_best, marks=slow)], ids=["whole", "sharded"]
)
def test_several_answer_the_test_file_as_one_does_with_the_weights_that_are_saved(
    flags, reference, test_file, tmp_path, setup
):
    """Each question once. Of two epochs the first is kept here, so that it is to answer: one process trains only it."""
    flags["test_file"] = test_file
    folder, _ = reference(flags, 4, epochs=1)
    trained(2, flags, tmp_path, setup)
    assert answers_of(tmp_path, "test_predictions.jsonl") == answers_of(folder, "test_predictions.jsonl")
    one, several = log_of(folder), log_of(tmp_path)
    for epoch in (0, 1):
        assert several[epoch]["test_loss"] == pytest.approx(one[epoch]["test_loss"], rel=1e-5)
        assert several[epoch]["test_accuracy"] == one[epoch]["test_accuracy"]
    assert "test_loss" not in several[2] and several[2]["valid_loss"] != pytest.approx(one[1]["valid_loss"], rel=1e-3)
    weights, expected = (load_file(each / "out" / "model.safetensors") for each in (tmp_path, folder))
    assert all(difference(name, weights[name], tensor) <= 1e-5 for name, tensor in expected.items())


def test_what_another_process_could_not_read_is_told_as_well(flags, tmp_path):
    """Of the picture that the second process loses, the first, which writes, meets nothing."""
    notes = trained(2, flags, tmp_path, second_loses_a_picture, features_dir="none", checkpoint_minutes=1e-9)
    left_out = [record["left_out"] for record in log_of(tmp_path)]
    assert left_out[0] == 0 < left_out[1] == left_out[2]
    assert [1, left_out[1]] in notes[0]["left_out_when_written"]  # within the epoch already, as it may stop there
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- picture broken, during the run: {left_out[1]} ({flags['train_file']}:" in card


def test_one_process_speaks_and_all_finish(flags, tmp_path):
    """And all go on while the main one writes: the first step's checkpoint is not written before the third step."""
    notes = trained(2, flags, tmp_path, main_writes_while_all_go_on, epochs=1)
    assert [each.get("steps_when_written") for each in notes] == [[[1, 3]], None]
    main, other = ((tmp_path / f"out{rank}.txt").read_text() for rank in range(2))
    assert "An optimizer step takes 4 questions: 2 processes x BATCH_SIZE 2 x 1 micro-batch; an epoch" in main
    assert main.count("Encoding 11 pictures") == main.count("Trainable parameters: ") == 1
    assert "Epoch 1 of 1: Training Avg Loss" in main and "Saved to" in main
    assert other == ""


@slow
@pytest.mark.skipif(subprocess.run(["unshare", "--net", "true"]).returncode != 0, reason="no right to a namespace")
def test_gradients_are_sent_once_a_step(data, monkeypatch, capfd):
    """Bytes on the wire: what a ring sends of the gradients, and 2% for everything else, accumulating or not."""
    words = ["--train_file", str(data / "train.jsonl"), "--valid_file", str(data / "valid.jsonl")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--grad_accum_steps", "2", "--epochs", "1", *words])
    scaling.main()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    figures = json.loads(line)
    sent, gradients = figures["bytes sent a step, all processes"], figures["bytes of gradients"]
    assert 2 * gradients <= sent < 1.02 * 2 * gradients


# ---------------------------------------------------------------------------------------------------------------------
# Processes that fail, are killed or stopped
# ---------------------------------------------------------------------------------------------------------------------


def test_a_failure_in_one_ends_all_in_seconds(flags, tmp_path):
    started = time.monotonic()
    children = Children(3, flags, tmp_path, failing)
    assert children.wait(60) == [1, 1, 1]
    assert time.monotonic() - started < 60
    texts = [child.text() for child in children]
    assert texts[2].strip().endswith("error: the disk of this machine caught fire")
    for rank in (0, 1):
        assert texts[rank].strip().endswith(f"error: process {rank} ends because another process did")
        assert "Traceback" not in texts[rank]


def test_bad_data_is_said_once(flags, tmp_path):
    flags["train_file"].write_text('{"image_path": "0.png", "question": "Why?"}\n')
    children = Children(2, flags, tmp_path)
    assert children.wait(60) == [1, 1]
    assert "train.jsonl:1" in children[0].text() and "train.jsonl" not in children[1].text()
    assert all("Traceback" not in child.text() for child in children)


@slow
def test_long_work_is_waited_for_longer_than_a_dead_process(tmp_path):
    children = Children(2, reading_for_long, tmp_path)
    assert children.wait() == [0, 0], [child.text() for child in children]
    for rank in range(2):
        assert (tmp_path / f"notes{rank}.json").read_text() == "read by 0\n[False, True]\n"


def test_a_process_that_answers_no_more_ends_the_others(flags, tmp_path):
    children = Children(2, {**flags, "epochs": 100_000}, tmp_path, impatient)
    wait_for(lambda: "Before training" in children[0].text(), children)
    os.kill(children[1].process.pid, signal.SIGSTOP)
    try:
        assert children[0].wait(60) == 1
    finally:
        children[1].kill()
    assert children[0].text().strip().endswith("error: process 0 ends because another process did")
    assert "Traceback" not in children[0].text()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_process_of_a_machine_fetches_for_all(tmp_path, processes):
    """And a process that is alone works as if there were no others: in its main thread."""
    children = Children(processes, fetching, tmp_path)
    assert children.wait() == [0] * processes, children[0].text()
    notes = [(tmp_path / f"notes{rank}.json").read_text().split() for rank in range(processes)]
    assert notes == [["fetched", "True"], ["found", "True"]][:processes]


def test_what_goes_wrong_in_long_work_ends_all_at_once(tmp_path):
    children = Children(2, reading_in_vain, tmp_path)
    assert children.wait(60) == [1, 1]
    assert children[0].text().splitlines()[1:] == ["error: train.jsonl:1 is no JSON"]
    assert children[1].text() == "error: process 1 ends because another process did\n"


@pytest.mark.parametrize("processes", [1, 3])
def test_all_processes_agree_what_is_due_and_when_to_stop(tmp_path, processes):
    """In one exchange; a process that is alone has none."""
    children = Children(processes, agreeing, tmp_path)
    assert children.wait() == [0] * processes, children[0].text()
    for rank in range(processes):
        notes = (tmp_path / f"notes{rank}.json").read_text()
        assert notes == f"False True True False\nSIGTERM {int(processes > 1)}\n"


def wait_for(what, children):
    while not what():
        assert all(child.process.exitcode is None for child in children), children[0].text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(flags, uninterrupted):
    """A run of two processes that nothing interrupts, with a checkpoint each step as the others have."""
    flags |= {"checkpoint_minutes": 1e-9}
    if not (uninterrupted / "out").exists():
        trained(2, flags, uninterrupted)
    return uninterrupted


@pytest.mark.parametrize(
    "killed", [[0], pytest.param([1], marks=slow), pytest.param([0, 1], marks=slow)], ids=["main", "other", "both"]
)
def test_killed_it_goes_on_in_as_many_processes_to_the_same_bits(flags, whole, tmp_path, killed):
    started = {**flags, "output_dir": tmp_path / "cut" / "out"}
    children = Children(2, started, tmp_path / "cut", in_float32_writing_in_background, WAITS="")
    wait_for(lambda: list((tmp_path / "cut" / "out" / "checkpoints").glob("epoch-000001-step-00000002")), children)
    for rank in killed:
        os.kill(children[rank].process.pid, signal.SIGKILL)
    (tmp_path / "cut" / "go").touch()
    assert all(children.wait(60))
    assert not (tmp_path / "cut" / "out" / "config.json").exists()
    trained(2, flags, tmp_path / "cut", features_dir=tmp_path / "features")
    assert "Going on in epoch 1 after step" in (tmp_path / "cut" / "out0.txt").read_text()
    assert log_of(tmp_path / "cut") == log_of(whole)
    weights, expected = (folder / "out" / "model.safetensors" for folder in (tmp_path / "cut", whole))
    assert weights.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=slow)])
def test_stopped_it_goes_on_in_another_number_of_processes(flags, whole, tmp_path, processes):
    """SIGTERM to one of two ends both, at a step; the questions of a step stay what they were."""
    stopped(2, {**flags, "output_dir": tmp_path / "cut" / "out"}, tmp_path / "cut", in_float32, 1)
    trained(processes, flags, tmp_path / "cut", features_dir=tmp_path / "features")
    out = (tmp_path / "cut" / "out0.txt").read_text()
    assert "Going on in epoch 1 after step" in out
    parts = {1: "1 process x BATCH_SIZE 2 x 2 micro-batches", 3: "3 processes x BATCH_SIZE 2 x 1 micro-batch"}
    assert f"An optimizer step takes 4 questions: {parts[processes]}; an epoch" in out
    assert_same_log(tmp_path / "cut", whole)
    weights, expected = (load_file(folder / "out" / "model.safetensors") for folder in (tmp_path / "cut", whole))
    for name, tensor in expected.items():
        assert difference(name, weights[name], tensor) <= 2e-5, name


# ---------------------------------------------------------------------------------------------------------------------
# Sharded
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "release", "gathers"),
    [
        ({}, TINY, 4 * 2 + 2),  # three layers and the embeddings before each pass, all others once
        pytest.param({}, TINY_2025, 3 * 2 + 2, marks=slow),  # where the embeddings are among the others
        pytest.param({"lora_rank": 4, "learning_rate": 1e-3, "epochs": 1}, TINY, 4 * 2 + 2, marks=slow),
    ],
    ids=["every weight", "2025", "adapters"],
)
def test_sharded_it_trains_as_one(flags, smallest, reference, tmp_path, changes, release, gathers):
    """And gathers in a step what it needs, not more: `lm_head` stays from one pass to the other."""
    flags["model_id"] = smallest[release]
    folder, one = reference(flags, 4, **changes)
    several = trained(2, flags, tmp_path, sharded, **changes)
    assert all(noted["sharded"] for noted in several) and not one["sharded"]
    assert all(noted["gathers"] == gathers * len(noted["steps"]) for noted in several)
    assert_same_training(one, several, folder, tmp_path, flags["model_id"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert saved.get_input_embeddings().weight.isfinite().all()


def checkpoint_of(folder):
    (path,) = (folder / "out" / "checkpoints").glob("epoch-*")
    state = torch.load(path / "optimizer.pt", weights_only=True)
    return {file.name for file in path.iterdir()}, load_file(path / "model.safetensors"), state


@pytest.mark.parametrize(
    ("setup", "then"), [(sharded, in_float32), pytest.param(in_float32, sharded, marks=slow)], ids=["from", "to"]
)
def test_sharded_checkpoints_are_those_of_one_process(flags, whole, tmp_path, setup, then):
    """What two sharded processes wrote, one plain process goes on from, and the other way round."""
    processes, others = (2, 1) if setup is sharded else (1, 2)
    flags = {**flags, "grad_accum_steps": 2 // processes}
    started = {**flags, "output_dir": tmp_path / "cut" / "out"}
    stopped(processes, started, tmp_path / "cut", setup, 0)
    names, weights, state = checkpoint_of(tmp_path / "cut")
    assert names == {"model.safetensors", "optimizer.pt", "progress.json"}
    assert {f"text_model.{name}" for name in weights} < set(load_file(flags["model_id"] / "model.safetensors"))
    for name, each in state["optimizer"]["state"].items():
        assert each["exp_avg"].shape == weights[name].shape
    trained(others, flags, tmp_path / "cut", then, features_dir=tmp_path / "features")
    assert "Going on in epoch 1 after step" in (tmp_path / "cut" / "out0.txt").read_text()
    assert_same_log(tmp_path / "cut", whole)


@pytest.mark.parametrize(
    "setup", [in_bfloat16, pytest.param(sharded_in_bfloat16, marks=slow)], ids=["whole", "sharded"]
)
def test_the_bits_behind_bfloat16_weights_go_through_a_checkpoint(flags, tmp_path, setup):
    trained(2, flags, tmp_path / "whole", setup, features_dir=tmp_path / "features")
    started = {**flags, "output_dir": tmp_path / "cut" / "out", "features_dir": tmp_path / "features"}
    stopped(2, started, tmp_path / "cut", setup, 0)
    _, weights, state = checkpoint_of(tmp_path / "cut")
    for name, each in state["optimizer"]["state"].items():
        assert each["low"].dtype == (torch.int8 if weights[name].dim() > 1 else torch.int32), name
        assert each["low"].shape == weights[name].shape and each["low"].any(), name
    trained(2, flags, tmp_path / "cut", setup, features_dir=tmp_path / "features")
    assert "Going on in epoch 1 after step" in (tmp_path / "cut" / "out0.txt").read_text()
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    weights, expected = (tmp_path / name / "out" / "model.safetensors" for name in ("cut", "whole"))
    assert weights.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("stopped", "then"),
    [
        (stopped_before_it_is_applied, in_float32),
        pytest.param(sharded_and_stopped_before_it_is_applied, sharded, marks=slow),
    ],
    ids=["whole", "sharded"],
)
def test_stopped_before_the_first_applied_step_they_go_on_as_if_they_were_not(flags, tmp_path, stopped, then):
    flags |= {"features_dir": tmp_path / "features"}
    trained(2, flags, tmp_path / "whole", first_step_is_lost, features_dir=tmp_path / "features")
    started = {**flags, "output_dir": tmp_path / "cut" / "out"}
    children = Children(2, started, tmp_path / "cut", stopped, **environment(then))
    assert children.wait() == [128 + signal.SIGTERM] * 2, children[0].text()
    assert checkpoint_of(tmp_path / "cut")[2]["optimizer"] is None
    trained(2, flags, tmp_path / "cut", then, features_dir=tmp_path / "features")
    assert_same_log(tmp_path / "cut", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Two machines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts():
    """Two hosts as (network namespace, address); where there is no right to make them, this machine twice."""
    names = [f"fm{os.getpid() % 10_000}{side}" for side in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip -n {names[0]} link add eth type veth peer name eth netns {names[1]}"]
    for k, name in enumerate(names, start=1):
        commands += [f"ip -n {name} addr add 10.77.0.{k}/24 dev eth", f"ip -n {name} link set eth up"]
        commands += [f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield [(name, f"10.77.0.{k}") for k, name in enumerate(names, start=1)]
    except (OSError, subprocess.CalledProcessError):
        yield [(None, "127.0.0.1")] * 2
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def enter(namespace, folder):
    """Makes this process one of the machine whose network this is, in a folder there."""
    os.chdir(folder)
    if namespace:
        with Path("/run/netns", namespace).open() as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0


@slow
def test_two_machines_that_share_no_folder(flags, data, hosts, tmp_path):
    """Each keeps its own features; the first has the model, the log and the report, the second nothing of them."""
    folders = [tmp_path / "first", tmp_path / "second"]
    flags |= {"train_file": "train.jsonl", "valid_file": "valid.jsonl", "features_dir": "features"}
    flags |= {"output_dir": "out", "epochs": 1}
    shared = {"MASTER_ADDR": hosts[0][1], "MASTER_PORT": "29601", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "eth" if hosts[0][0] else "lo"}
    machines = []
    for rank, ((namespace, _), folder) in enumerate(zip(hosts, folders, strict=True)):
        shutil.copytree(data, folder)
        mine, setup = {**shared, "RANK": str(rank)}, partial(enter, namespace, folder)
        machines.append(Child(flags, folder / "out.txt", environment=mine, setup=setup))
    statuses, (first, second) = [each.wait() for each in machines], [each.text() for each in machines]
    assert statuses == [0, 0], first + second
    assert "Epoch 1 of 1: Training Avg Loss" in first and "Saved to out" in first
    assert "Epoch 1 of 1" not in second and not (folders[1] / "out" / "config.json").exists()
    assert (folders[0] / "out" / "model.safetensors").exists()
    stored = [{file.name for file in (folder / "features").rglob("*.safetensors")} for folder in folders]
    assert stored[0] == stored[1] and len(stored[0]) == 11
    assert "Traceback" not in first + second


# ---------------------------------------------------------------------------------------------------------------------
# Trackers
# ---------------------------------------------------------------------------------------------------------------------


def tracked(tracker, steps):
    return SimpleNamespace(tracker=tracker, epochs=5), Progress({}, total_steps=steps, tracker_id="0123abcd")


def test_a_run_that_goes_on_does_so_in_tensorboard(tmp_path):
    """What was logged behind the checkpoint is there once, as it was the second time; settings are told once."""
    for values, steps in [({0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0}, 0), ({2: 20.0, 3: 30.0, 4: 40.0}, 1)]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        launch.start_tracker(accelerator, *tracked("tensorboard", steps))
        for step, value in values.items():
            accelerator.log({"train_loss": value}, step)
        accelerator.end_training()
    events = EventAccumulator(str(tmp_path / launch.TRACKED)).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in events] == [(0, 9), (1, 1), (2, 20), (3, 30), (4, 40)]
    assert len(list(tmp_path.glob(f"{launch.TRACKED}/*/hparams.yml"))) == 1


def test_a_run_that_goes_on_does_so_in_other_trackers():
    """As arguments of `wandb.init` and `trackio.init`."""
    told = []
    accelerator = SimpleNamespace(init_trackers=lambda *arguments: told.append(arguments))
    for tracker in (None, "wandb", "trackio"):
        for steps in (0, 7):
            launch.start_tracker(accelerator, *tracked(tracker, steps))
    wandb, trackio = ({name: "0123abcd", "resume": "allow"} for name in ("id", "name"))
    assert told == [
        (launch.TRACKED, {"tracker": "wandb", "epochs": "5"}, {"wandb": wandb}),
        (launch.TRACKED, None, {"wandb": wandb}),
        (launch.TRACKED, {"tracker": "trackio", "epochs": "5"}, {"trackio": trackio}),
        (launch.TRACKED, None, {"trackio": trackio}),
    ]


def test_several_processes_hold_gradients_once():
    """In the buckets that are sent, and not a second copy beside them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = launch.start()
    assert accelerator.ddp_handler.gradient_as_bucket_view
    assert accelerator.init_handler.timeout == launch.TIMEOUT


def test_accumulation_is_the_scripts_own(monkeypatch):
    """A launcher's would divide the loss once more, and skip steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert launch.start().gradient_accumulation_steps == 1
