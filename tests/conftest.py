"""What the tests share: the small checkpoint, small data, and ways to run the script."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_moondream as script
from moondream2.checkpoints import Progress
from moondream2.features import FeatureStore

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_moondream2"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def tiny():
    """The small checkpoint in float32, in which equalities can be tested as such."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def draw_picture(path, number, size=(140, 100)):
    """A picture that no other number gives."""
    image = Image.new("RGB", size, (40 * number % 256, 90, 255 - 25 * number % 256))
    ImageDraw.Draw(image).rectangle([5 + number, 10, 30 + 3 * number, 50], fill="white")
    image.save(path)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    """A folder with train.jsonl (8 pictures, 1 to 4 questions each, 19 lines) and valid.jsonl (3 pictures, 7 lines)."""
    questions = ["What is it?", "How many white boxes are there?", "Is it safe to cross here?", "Why?"]
    answers = ["A box.", "One.", "Yes, the road is clear and the light is green.", "Nobody knows."]
    lines = {"train": [], "valid": []}
    for number, count in enumerate([1, 4, 2, 3, 1, 4, 3, 1, 2, 4, 1]):
        split = "train" if number < 8 else "valid"
        name = f"{number}.png"
        draw_picture(tmp_path / name, number, (140, 100) if number % 3 else (560, 420))
        for k in range(count):
            answer = f"{answers[k]} {number % 4}"
            lines[split].append({"image_path": name, "question": questions[k], "answer": answer})
    for split, each in lines.items():
        write_lines(tmp_path / f"{split}.jsonl", each)
    return tmp_path


def dataset(path, tokenizer, room=2048 - 82):
    """A tokenized VQADataset."""
    result = script.VQADataset(path)
    result.tokenize(tokenizer, room)
    return result


def collator(model, tokenizer, dataset, folder=None):
    shape = (model.config.image_tokens, model.config.text_config.hidden_size)
    store = FeatureStore(folder, model.vision_encoder, shape)
    return script.Collator(model, tokenizer, store, dataset.pictures)


def make_run(model, tokenizer, train, valid, folder=None, **constants):
    """A Run on the CPU, as `prepare` makes it but for checkpoints; `folder` keeps features."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model.vision_encoder.requires_grad_(False)
    values = {name.lower(): vars(script)[name] for name in vars(script)["__annotations__"] if name.isupper()}
    values |= constants
    constants = SimpleNamespace(**values)
    accelerator = Accelerator(cpu=True)
    step_size = constants.batch_size * constants.grad_accum_steps
    sampler = script.StepSampler(train, step_size, constants.batch_size, constants.group_by_picture, constants.seed)
    optimizer = script.build_optimizer(
        model.text_model, constants.learning_rate, constants.weight_decay, constants.betas
    )
    scheduler = script.build_scheduler(
        optimizer, constants.lr_schedule, constants.warmup_steps, sampler.steps * constants.epochs
    )
    collate = collator(model, tokenizer, train, folder)
    collate.pictures = train.pictures | valid.pictures
    text_model, optimizer = accelerator.prepare(model.text_model, optimizer)
    return script.Run(
        constants=constants,
        accelerator=accelerator,
        stop=SimpleNamespace(check=lambda: None),
        output_dir=None,
        train=train,
        valid=valid,
        data={},
        model=model,
        text_model=text_model,
        tokenizer=tokenizer,
        store=collate.store,
        collate=collate,
        sampler=sampler,
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoints=SimpleNamespace(save=lambda *args: None),
        progress=Progress({}, epoch=1),
        room=2048 - 82,
    )


@pytest.fixture
def run_main(monkeypatch):
    """`run_main(epochs=1, ...)` runs the script's `main` in this process with these flags."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def run(**flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["finetune_moondream.py", *words])
        script.main()

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def start_script(flags, cwd=ROOT, **environment):
    """The script in a process of its own."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "finetune_moondream.py"), *words],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(code, cwd, **environment):
    """Python code in a process that knows nothing of this project; returns what it printed."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
