"""Each constant of the script's block does what its comment says, as a run of the real script shows."""

import json
import math
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import finetune_moondream as script
from moondream2 import cli, launch, modeling_moondream2, optimizer
from moondream2.cli import InputError
from tests.shared import TINY, draw_picture, write_lines

STEPS = 3  # of an epoch of the 18 training questions, at the values below

# A constant's other value, and what shows it: true of a run with all of these values, false of one with the defaults.
TABLE = {
    "MODEL_ID": ("other_model", lambda run: {model for model, _ in run.loaded} == {"other_model"}),
    "REVISION": ("other", lambda run: {words["revision"] for _, words in run.loaded} == {"other"}),
    "TRAIN_FILE": ("other_train.jsonl", lambda run: run.read[0] == Path("other_train.jsonl")),
    "VALID_FILE": ("other_valid.jsonl", lambda run: run.read[1] == Path("other_valid.jsonl")),
    "TEST_FILE": ("other_test.jsonl", lambda run: run.read[2:] == [Path("other_test.jsonl")]),
    "OUTPUT_DIR": ("other_out", lambda run: run.made >= {"other_out/model.safetensors", "other_out/report.html"}),
    "TILES": (False, lambda run: run.saved["vision_config"]["tile_from"] is None),
    "EPOCHS": (2, lambda run: [record["epoch"] for record in run.log] == [0, 1, 2]),
    "BATCH_SIZE": (3, lambda run: len(run.steps[0].sources) == 3 * len(run.steps[0].batches) and run.judged == 4 * 3),
    "LEARNING_RATE": (1e-3, lambda run: max(step.learning_rate for step in run.steps) == 1e-3),
    "LORA_RANK": (4, lambda run: sum(p.numel() for group in run.groups for p in group["params"]) == 4 * 3 * 16 * 192),
    "GRAD_ACCUM_STEPS": (2, lambda run: len(run.steps[0].batches) == 2),
    "GRADIENT_CHECKPOINTING": (True, lambda run: all(step.layer_calls == 2 * len(step.batches) for step in run.steps)),
    "COMPILE": (True, lambda run: run.compiled),
    "GROUP_BY_PICTURE": (False, lambda run: is_shuffled(run, run.constants.seed)),
    "FEATURES_DIR": ("other_features", lambda run: {"known_pictures.json", 9} <= in_folder(run, "other_features")),
    "LR_SCHEDULE": ("linear", lambda run: run.steps[-1].learning_rate == pytest.approx(1e-3 / (2 * STEPS - 1))),
    "WARMUP_STEPS": (2, lambda run: run.steps[0].learning_rate == run.steps[1].learning_rate / 2),
    "WEIGHT_DECAY": (0.5, lambda run: [group["weight_decay"] for group in run.groups] == [0.5, 0]),
    "BETAS": ((0.8, 0.9), lambda run: {group["betas"] for group in run.groups} == {(0.8, 0.9)}),
    "MAX_GRAD_NORM": (0.1, lambda run: run.gradients == pytest.approx([0.1] * len(run.steps), rel=0.01)),
    "PATIENCE": (2, lambda run: run.epochs_without_a_better_one == 2),
    "VALID_ANSWERS": (4, lambda run: len(run.answered) == 4),
    "CHECKPOINT_MINUTES": (1e-9, lambda run: run.saves == len(run.steps) + len(run.log)),
    "OVERWRITE": (True, lambda run: run.may_begin_again),
    "TRACKER": ("tensorboard", lambda run: any(name.startswith(f"other_out/{launch.TRACKED}/") for name in run.made)),
    "SEED": (7, lambda run: is_shuffled(run, 7) and run.answered == drawn(run, 7, 4)),
}


def in_folder(run, folder):
    """The names of files right in a folder, and how many features are below it."""
    names = [name for name in run.made if name.startswith(f"{folder}/")]
    return {Path(name).name for name in names} | {sum(name.endswith(".safetensors") for name in names)}


def is_shuffled(run, seed):
    """Whether the first epoch's steps take the examples one by one, as this seed shuffles them."""
    order, size = [f"{run.read[0]}:{number}" for number in range(1, 19)], len(run.steps[0].sources)
    random.Random(f"{seed} 1").shuffle(order)
    steps = [set(order[start : start + size]) for start in range(0, 18, size)]
    return steps == [set(step.sources) for step in run.steps[: len(steps)]]


def drawn(run, seed, most):
    """So many validation questions, as this seed draws them."""
    return set(random.Random(seed).sample([f"{run.read[1]}:{number}" for number in range(1, 10)], most))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the default data and model, and with others."""
    folder = tmp_path_factory.mktemp("constants")
    (folder / "vikhyatk").mkdir()
    for name in (script.MODEL_ID, "other_model"):
        (folder / name).symlink_to(TINY)
    lines = {"train": [], "valid": [], "test": [{"image_path": "0.png", "question": "What is it?", "answer": "It"}]}
    for number in range(9):
        draw_picture(folder / f"{number}.png", number)
        os.utime(folder / f"{number}.png", (1e9, 1e9))
        for question in ("What is it?", "How many?", "Why?"):
            line = {"image_path": f"{number}.png", "question": question, "answer": f"One {number}"}
            lines["train" if number < 6 else "valid"].append(line)
    for name, each in lines.items():
        write_lines(folder / f"{name}.jsonl", each)
        write_lines(folder / f"other_{name}.jsonl", each)
    return folder


def run_in(folder, *flags):
    """A run of `main` with these flags, and all that TABLE asks of it."""
    run = SimpleNamespace(loaded=[], read=[], steps=[], gradients=[], saves=0, layers=0, compiled=False)
    before = files_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run.constants = cli.parse(script, flags)
        watch(run, patch)
        begin(patch, *flags)
    output = folder / run.constants.output_dir
    run.made, run.log = files_in(folder) - before, lines_of(output / "training_log.jsonl")
    run.saved = json.loads((output / "config.json").read_text())
    run.answered = {answer["source"] for answer in lines_of(output / "predictions.jsonl")}

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "compile_layers", lambda *args: None)
        patch.setattr(script, "train_epoch", lambda *args: None)
        losses = iter([3.0, 2.0, *(2.5 + i for i in range(20))])  # the first epoch is the best
        patch.setattr(script, "evaluate", lambda *args: (next(losses), {}))
        begin(patch, *flags, "--output_dir", f"patient_{output.name}", "--epochs", "9", "--test_file", "none")
        run.epochs_without_a_better_one = (
            lines_of(folder / f"patient_{output.name}/training_log.jsonl")[-1]["epoch"] - 1
        )

        patch.setattr(script, "fine_tune", lambda *args: None)
        try:
            begin(patch, *flags)
            run.may_begin_again = True
        except InputError:
            run.may_begin_again = False
    return run


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def watch(run, patch):
    def noting(owner, name, note):
        function = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **words: (note(*args, **words), function(*args, **words))[1])

    def load_model(*release, load=script.load_model):
        model = load(*release)
        model.text_model.layers[0].ln.register_forward_hook(lambda *args: vars(run).update(layers=run.layers + 1))
        return model

    def backward(engine, batches, *more, backward=script.backward):
        calls = run.layers
        loss = backward(engine, batches, *more)
        sources = [example.source for batch in batches for row in batch["rows"] for example in row]
        run.groups = engine.optimizer.param_groups
        run.steps.append(SimpleNamespace(batches=batches, sources=sources, layer_calls=run.layers - calls))
        return loss

    def update(*arguments, update=script.update):
        sent = update(*arguments)
        run.steps[-1].learning_rate = sent.learning_rate
        return sent

    def note_gradient(self, closure=None):
        gradients = [p.grad.float().norm() for group in self.param_groups for p in group["params"]]
        run.gradients.append(math.hypot(*torch.stack(gradients).tolist()) / self.grad_scale.item())

    owners = {"AutoConfig": script, "AutoModelForCausalLM": script, "AutoTokenizer": modeling_moondream2}
    for name, owner in owners.items():
        stand_in = SimpleNamespace(from_pretrained=getattr(owner, name).from_pretrained)
        patch.setattr(owner, name, stand_in)
        noting(stand_in, "from_pretrained", lambda model, **words: run.loaded.append((model, words)))
    noting(script, "read_lines", lambda path, *more: run.read.append(path))
    noting(script, "whole_rows", lambda examples, prefix, pictures, most: vars(run).update(judged=pictures))
    noting(script.Checkpoints, "save", lambda *args, **words: vars(run).update(saves=run.saves + 1))
    noting(optimizer.AdamW, "step", note_gradient)
    patch.setattr(script, "compile_layers", lambda *args: vars(run).update(compiled=True))
    patch.setattr(script, "load_model", load_model)
    patch.setattr(script, "backward", backward)
    patch.setattr(script, "update", update)
    patch.setattr(script, "most_new_tokens", lambda *arguments: 2)


def begin(patch, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    patch.setattr(sys, "argv", ["finetune_moondream.py", *flags])
    script.main()


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def defaults(folder):
    return run_in(folder)


@pytest.fixture(scope="module")
def others(folder):
    words = {
        name.lower(): ",".join(map(str, value)) if name == "BETAS" else value for name, (value, _) in TABLE.items()
    }
    return run_in(folder, *(word for name, value in words.items() for word in (f"--{name}", str(value))))


@pytest.mark.parametrize("name", cli.annotations(script))
def test_another_value_shows(name, defaults, others):
    """A constant that is added needs a line in TABLE."""
    _, shows = TABLE[name]
    assert shows(others)
    assert not shows(defaults)


def test_no_code_of_the_hub_is_run(defaults):
    assert {words["trust_remote_code"] for _, words in defaults.loaded} == {False} and len(defaults.loaded) == 3


def test_the_revision_is_a_commit():
    """A tag or a branch could come to mean other files."""
    assert re.fullmatch("[0-9a-f]{40}", script.REVISION)
