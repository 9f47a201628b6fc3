"""What a card does, and whether it computes what a CPU does: one table, to be pasted where it is discussed.

`python -m tests.gpu_check` takes some five minutes on any card with bfloat16. Where there are two, they train together
as well. Without a card it says so. Its status is 1 where a figure is out of its bounds. `--rehearse` runs all of it on
the CPU, with the small checkpoint where a model trains, to see that it works: its times mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoTokenizer

import finetune_moondream as script
from moondream2 import check, cli
from moondream2.checkpoints import Progress
from moondream2.compilation import compile_layers
from moondream2.features import CHUNK, FeatureStore, encode_pictures, image_embeds
from moondream2.machine import row_multiple, set_up_torch, training_dtype, what_it_runs_on
from moondream2.modeling_moondream2 import row_mask
from moondream2.pace import Pace, in_words
from moondream2.pictures import read_ahead
from moondream2.rows import StepSampler, lay_out, rows_of, text_inputs
from tests.benchmark import Examples, build, timed
from tests.recipe import fill, golden_encoder, golden_text_model, picture
from tests.shared import ROOT, TINY, constants
from tests.test_golden import BOS, GOLDEN, TEXT

PICTURES, QUESTIONS = 16, 4  # of the steps that are timed, and questions on each picture
COMPILED = "with COMPILE"
GIB = 2**30


class Table:
    """The table, printed row by row; `is_good` until a figure is out of its bounds."""

    def __init__(self):
        self.is_good = True
        print("| what | figure | bounds | |\n| --- | --- | --- | --- |", flush=True)

    def figure(self, what, figure):
        print(f"| {what} | {figure} | | |", flush=True)

    def difference(self, what, difference, most):
        """A relative one; what is not a number is out of any bounds."""
        is_good = difference <= most
        self.is_good &= is_good
        print(f"| {what} | {difference:.2g} | {most:g} | {'ok' if is_good else 'OUT OF BOUNDS'} |", flush=True)


def relative(found, expected):
    """The length of the difference of two tensors, of the expected one's."""
    found, expected = (each.detach().float().cpu().flatten() for each in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def golden_figures(table, device, encoder, text):
    """The released code's embeddings of a picture with two tiles, and its loss, in bfloat16 on the device."""
    encoder, text = (part.to(device, torch.bfloat16) for part in (encoder, text))
    embeds = encoder(picture(600, 900))[0, ::27, ::16]
    expected = load_file(GOLDEN / "golden.safetensors")["vision.600x900.embeds"]
    table.difference("golden embeddings", relative(embeds, expected), 0.05)
    image = fill("image_embeds.a", (1, 729, 2048), scale=0.5).to(device)
    question, answer = TEXT["question_a"], TEXT["answer_a"]
    ids = torch.tensor([[BOS, *question, *answer]], device=device)
    logits = text(input_ids=ids, image_embeds=image).logits[0, -len(answer) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, -len(answer) :]).item()
    table.difference("golden loss", abs(loss / TEXT["loss_a"] - 1), 0.002)


class Side:
    """A model on a device, with examples laid out for it; random weights, or the small checkpoint's in a rehearsal."""

    def __init__(self, folder, device, is_rehearsal, dtype=torch.bfloat16, layers=24, vision_layers=27):
        size = {"tiny": is_rehearsal, "layers": layers, "vision_layers": vision_layers, "release": "2024-08-26"}
        self.device, self.model = device, build(SimpleNamespace(**size)).to(device, dtype)
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        lines = (PICTURES // 4 if is_rehearsal else PICTURES) * QUESTIONS
        self.examples = Examples(folder, self.model.config, tokenizer, lines, QUESTIONS)
        self.store = FeatureStore(folder / "features", self.model)
        tokens = {"bos": tokenizer.bos_token_id, "image_tokens": self.model.config.image_tokens}
        self.lay_out = partial(lay_out, pictures=self.examples.pictures, store=self.store, **tokens)

    def collate(self, rows, multiple):
        return script.collate(rows, partial(self.lay_out, multiple=multiple))

    def loss(self, batch):
        embeds = image_embeds(batch["pictures"], self.model.vision_encoder, self.device)
        return script.answer_loss(self.model.text_model, batch, embeds, self.device) / len(batch["targets"])


def step_against_cpu(table, device, folder, is_rehearsal):
    """A step's loss and gradient in bfloat16 on the device, and in float32 on the CPU, with the same weights."""
    found = []
    for place, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float32)):
        side = Side(folder, place, is_rehearsal, dtype, layers=4, vision_layers=1)
        loss = side.loss(side.collate(rows_of(side.examples[: 2 * QUESTIONS], 2**20), row_multiple(place)))
        loss.backward()
        gradient = torch.cat([p.grad.float().cpu().flatten() for p in side.model.text_model.parameters()])
        found.append((loss.detach(), gradient))
    for what, here, there, most in zip(("loss", "gradient"), *found, (0.005, 0.05), strict=True):
        table.difference(f"a step's {what}, of the CPU's in float32", relative(here, there), most)


def run(flags, launcher=(sys.executable,), stop_at=None, **environment):
    """The script's log, of a run in a process of its own, which is stopped once it has printed `stop_at`."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [*launcher, "finetune_moondream.py", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        said = ""
        for line in process.stdout:  # a progress bar's, too
            said += line
            if stop_at and stop_at in line:
                process.send_signal(signal.SIGINT)
                stop_at = None
    assert process.returncode in (0, 128 + signal.SIGINT), said[-3000:]
    assert ("Running in 2 processes" in said) == (len(launcher) > 1), said[:300]
    log = Path(flags["output_dir"]) / "training_log.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def whole_runs(table, folder, is_rehearsal):
    """Of the small checkpoint: a run, one that is stopped and goes on, and two cards together; their last losses."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} if is_rehearsal else {"CUDA_VISIBLE_DEVICES": first}
    flags = {"model_id": TINY, "epochs": 2, "batch_size": 8, "valid_answers": 8, "features_dir": folder / "features"}
    if is_rehearsal:
        flags |= {"train_file": "tests/test.jsonl", "valid_file": "tests/test.jsonl"}  # fewer
    expected = run({**flags, "output_dir": folder / "whole"}, **alone)[-1]["valid_loss"]

    def agrees(what, records):
        table.difference(f"{what}: its last loss", abs(records[-1]["valid_loss"] / expected - 1), 0.02)

    stopped = run({**flags, "output_dir": folder / "stopped"}, stop_at="Epoch 1 of 2", **alone)
    assert len(stopped) < 3, "the run was not stopped"
    agrees("a run that is stopped and goes on", run({**flags, "output_dir": folder / "stopped"}, **alone))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    ways = {"DDP": launch, "FSDP": [*launch, "--config_file", "moondream2/fsdp.yaml"]}
    if is_rehearsal:
        ways, together = {"DDP": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]}, alone
    elif torch.cuda.device_count() < 2:
        return table.figure("DDP and FSDP over NCCL", "not tried, there is one card")
    else:
        together = {}
    for name, launcher in ways.items():
        two = run({**flags, "batch_size": 4, "output_dir": folder / name}, launcher, **together)
        agrees(f"two processes, {name}", two)
    return None


def dense_inputs(batch, device):
    """What the text model takes, with one mask over whole rows."""
    mask = row_mask(batch["document_ids"].to(device), 0)
    return {**text_inputs(batch, device), "attention_mask": mask}


def rates(table, side, compiler):
    """The encoder's; then those of steps of 8 questions on 2 pictures, and of the same without each of their parts."""
    pictures = list(side.examples.pictures.values())
    chunks = [pictures[i : i + CHUNK] for i in range(0, len(pictures), CHUNK)]
    seconds, unusable = timed(lambda: encode_pictures(chunks, side.model.vision_encoder, side.store, show=False))
    assert not unusable
    table.figure("pictures are encoded", f"{len(pictures) / seconds:.1f} a second, decoding and all")
    side.model.vision_encoder.to("cpu")  # as a run does

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=side.device.type == "cpu")
    sampler = StepSampler(side.examples, side.model.config.prefix_tokens, 8, 8, True, 0)
    engine = script.build_engine(side.model, accelerator, sampler.steps, constants())
    watched = Pace(side.model.text_model, accelerator, sampler, 1)
    side.model.train()
    for name, multiple, cudnn, inputs in (
        ("as they are", 64, False, text_inputs),
        ("rows not padded", 1, False, text_inputs),
        ("a mask over whole rows", 64, False, dense_inputs),
        ("with cuDNN's attention", 64, True, text_inputs),
        (COMPILED, 64, False, text_inputs),
    ):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if name == COMPILED:
            compile_layers(side.model.text_model, backend=compiler)
        if side.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with patch.object(script, "text_inputs", inputs):
            for _ in range(2):  # the first time kernels are chosen and compiled
                steps = train(engine, side, watched, partial(side.collate, multiple=multiple))
        told = in_words(watched.figures(Progress({}, epoch=1, step=sampler.steps)))
        table.figure(f"steps, {name}", f"{1000 * watched.seconds / steps:,.0f} ms each, {told}")
        if name == "as they are":
            largest = watched.largest
    torch.backends.cuda.enable_cudnn_sdp(False)
    trained = sum(p.numel() for p in side.model.text_model.parameters())
    activations = check.activation_bytes(side.model.config.text_config, largest, False)
    table.figure("peak by the arithmetic of docs/memory.md", f"{(check.TRAINED * trained + activations) / GIB:.1f} GiB")


def train(engine, side, watched, collate):
    """An epoch of the examples, as the script trains it; returns how many steps it had."""
    batches = read_ahead(collate, (batch for step in watched.sampler.epoch(1) for batch in step))
    with closing(batches):
        steps = watched.watched([batch] for batch in batches)
        for _ in script.train_steps(engine, steps, side.model.vision_encoder, script.MAX_GRAD_NORM):
            pass
    return watched.steps


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the small checkpoint")
    is_rehearsal = parser.parse_args(words).rehearse
    if not is_rehearsal and not torch.cuda.is_available():
        return print("No CUDA card here, so there is nothing to check.")
    set_up_torch()
    device = torch.device("cpu" if is_rehearsal else "cuda")
    training_dtype(device, None)
    print(f"{what_it_runs_on(device)}; torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        golden_figures(table, device, golden_encoder(), golden_text_model())
        step_against_cpu(table, device, folder, is_rehearsal)
        rates(table, Side(folder, device, is_rehearsal), "eager" if is_rehearsal else "inductor")
        whole_runs(table, folder, is_rehearsal)
    sys.exit(0 if table.is_good else 1)


if __name__ == "__main__":
    cli.run(main)
