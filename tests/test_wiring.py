"""The real script, from its flags to its log, against a plain loop that shares none of its code for training."""

import json
import math
import os
import random
import signal
from itertools import chain, repeat

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import ask, evaluation, features, launch
from moondream2.cli import InputError
from moondream2.pictures import pixels_of
from moondream2.scoring import is_correct
from tests.shared import TINY, TINY_2025, dataset, write_lines
from tests.test_training import plain_losses

pytestmark = pytest.mark.smallest


@pytest.fixture
def flags(data, small_model):
    flags = {"model_id": small_model, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl"}
    return {**flags, "output_dir": data / "out", "features_dir": data / "features", "epochs": 1, "batch_size": 4}


@pytest.fixture
def in_float32(monkeypatch):
    """Runs train in float32, in which equalities can be tested as such."""
    load = script.load_model
    monkeypatch.setattr(script, "load_model", lambda *release: load(*release).float())


def log_of(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Every number that a run prints or logs
# ---------------------------------------------------------------------------------------------------------------------


def rate_of(step, steps, schedule, warmup):
    """The share of the learning rate that a step, counted from 1, has."""
    if step <= warmup:
        return step / warmup
    left = (steps + 1 - step) / (steps + 1 - max(warmup, 1))
    return {"constant": 1, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


def plain_run(model, tokenizer, train, valid, c):
    """The steps and epochs of a run: each example in a row of its own, whole logits, torch's AdamW."""
    groups = [
        {"params": [p for p in model.text_model.parameters() if p.dim() > 1], "weight_decay": c["weight_decay"]},
        {"params": [p for p in model.text_model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c["learning_rate"], betas=c["betas"])
    in_epoch = math.ceil(len(train) / 4)
    steps, epochs = [], [judged(model, tokenizer, valid)]
    for epoch in (1, 2):
        order = list(range(len(train)))
        random.Random(f"{c['seed']} {epoch}").shuffle(order)
        total = tokens = 0
        for start in range(0, len(order), 4):
            examples = [train[i] for i in order[start : start + 4]]
            count = sum(len(example.answer_ids) for example in examples)
            loss = sum(plain_losses(model, tokenizer, examples, train.pictures)) / count
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.text_model.parameters(), c["max_grad_norm"]).item()
            share = rate_of(len(steps) + 1, 2 * in_epoch, c["lr_schedule"], c["warmup_steps"])
            for group in optimizer.param_groups:
                group["lr"] = c["learning_rate"] * share
            optimizer.step()
            optimizer.zero_grad()
            steps.append({"train_loss": loss.item(), "grad_norm": norm, "learning_rate": c["learning_rate"] * share})
            total, tokens = total + loss.item() * count, tokens + count
        epochs.append({"train_loss": total / tokens, **judged(model, tokenizer, valid)})
    return steps, epochs


def judged(model, tokenizer, valid):
    with torch.no_grad():
        losses = plain_losses(model, tokenizer, valid.examples, valid.pictures)
    right = []
    for example in valid:
        embeds = model.encode_image([pixels_of(valid.pictures[example.picture], model.vision_encoder.preprocess)])
        answer = model.answer_question(embeds, example.question, tokenizer, max_new_tokens=64)
        right.append(is_correct(answer, example.answers))
    tokens = sum(len(example.answer_ids) for example in valid)
    return {"valid_loss": sum(losses).item() / tokens, "valid_accuracy": sum(right) / len(right)}


DEFAULTS = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 0}
DEFAULTS |= {"lr_schedule": "constant", "warmup_steps": 0}


@pytest.mark.parametrize(
    ("changes", "small_model"),
    [
        ({}, TINY),
        ({"lr_schedule": "cosine", "warmup_steps": 3}, TINY_2025),
        ({"lr_schedule": "linear", "betas": (0.5, 0.9), "weight_decay": 30.0}, TINY),
        ({"max_grad_norm": 1e-7, "warmup_steps": 4, "seed": 5}, TINY),  # so short that AdamW's epsilon tells
    ],
    ids=["defaults", "cosine, of 2025-06-21", "linear, betas and decay", "clipped and seed"],
    indirect=["small_model"],
)
def test_every_number_of_a_run_is_that_of_a_plain_loop(
    flags, changes, in_float32, run_main, tiny, tokenizer, data, capsys
):
    c = {**DEFAULTS, **changes}
    written = {**c, "betas": "{},{}".format(*c["betas"])}
    run_main(**{**flags, **written, "epochs": 2, "group_by_picture": "false", "tracker": "tensorboard"})
    train, valid = (dataset(data / f"{split}.jsonl", tokenizer) for split in ("train", "valid"))
    steps, epochs = plain_run(tiny.bfloat16().float(), tokenizer, train, valid, c)

    events = EventAccumulator(str(flags["output_dir"] / launch.TRACKED)).Reload()
    for name in ("train_loss", "grad_norm", "learning_rate"):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == list(range(1, 11))
        assert [event.value for event in logged] == pytest.approx([step[name] for step in steps], rel=2e-3), name
        assert logged[0].value == pytest.approx(steps[0][name], rel=1e-5)
    for record, expected in zip(log_of(flags["output_dir"]), epochs, strict=True):
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, rel=2e-3), name
    out = capsys.readouterr().out
    for number, record in enumerate(log_of(flags["output_dir"])[1:], start=1):
        assert f"Epoch {number} of 2: Training Avg Loss: {record['train_loss']:.4f}, " in out
        assert f"Validation Avg Loss: {record['valid_loss']:.4f}, " in out


# ---------------------------------------------------------------------------------------------------------------------
# What is read, and how often
# ---------------------------------------------------------------------------------------------------------------------


def test_each_file_is_read_once(flags, run_main, test_file, monkeypatch):
    read, read_lines = [], script.read_lines
    monkeypatch.setattr(script, "read_lines", lambda path, *more: (read.append(path), read_lines(path, *more))[1])
    run_main(**flags, test_file=test_file)
    assert read == [flags["train_file"], flags["valid_file"], test_file]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_answers_may_be_as_long_as_the_data_s(flags, run_main, data, test_file, split):
    """Of each file; and so of the saved model."""
    lines = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    lines[0]["answer"] = "word " * 100
    write_lines(data / f"{split}.jsonl", lines)
    run_main(**flags, test_file=test_file)
    longest = max(len(example.answer_ids) for example in dataset(data / f"{split}.jsonl"))
    saved = json.loads((flags["output_dir"] / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == longest * 5 // 4 > 64


def test_a_rows_prefix_is_that_of_the_model(flags, run_main, monkeypatch):
    """82 positions of the small checkpoint, 730 of the released one: batches are cut by it."""
    prefixes = []

    def noting(function):
        return lambda data, prefix, *more: (prefixes.append(prefix), function(data, prefix, *more))[1]

    for name in ("StepSampler", "whole_rows"):
        monkeypatch.setattr(script, name, noting(getattr(script, name)))
    run_main(**flags)
    assert prefixes == [82, 82, 82]  # an epoch, and two looks at the validation questions


def test_on_a_card_rows_are_padded(flags, run_main, monkeypatch, data, tokenizer):
    """Those of training, of validation and of a file that is scored."""
    lengths = []
    for module, place in ((script, "training"), (evaluation, "judging")):

        def text_inputs(batch, device, place=place, text_inputs=module.text_inputs):
            lengths.append((place, batch["document_ids"].shape[1] % 64))
            return text_inputs(batch, device)

        monkeypatch.setattr(module, "text_inputs", text_inputs)
    for module in (script, ask):
        monkeypatch.setattr(module, "row_multiple", lambda device: 64)
    run_main(**flags)
    assert set(lengths) == {("training", 0), ("judging", 0)}
    lengths.clear()
    ask.answers_of(*ask.load(flags["output_dir"]), dataset(data / "valid.jsonl", tokenizer), batch_size=4)
    assert set(lengths) == {("judging", 0)}


# ---------------------------------------------------------------------------------------------------------------------
# Runs that go wrong on the way
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_whose_pictures_all_go_ends_and_goes_on_when_they_are_back(flags, run_main, monkeypatch, capsys):
    """They go behind the first epoch."""
    finish_epoch, there = script.finish_epoch, {}

    def finish_then_remove(progress, *more):
        finished = finish_epoch(progress, *more)
        if progress.epoch == 2:
            there.update((path, path.read_bytes()) for path in flags["train_file"].parent.glob("*.png"))
            for path in there:
                path.unlink()
        return finished

    flags |= {"features_dir": "none", "checkpoint_minutes": 1e-9, "epochs": 2}
    with monkeypatch.context() as patch, pytest.raises(InputError, match="bring the pictures back, and the same"):
        patch.setattr(script, "finish_epoch", finish_then_remove)
        run_main(**flags)
    for path, content in there.items():
        path.write_bytes(content)
    run_main(**flags)
    assert "Going on in epoch 2 after step 0" in capsys.readouterr().out
    before, first, second = log_of(flags["output_dir"])
    assert second["train_loss"] < first["train_loss"] and second["left_out"] == 0


def test_pictures_that_go_during_a_run_are_told_in_log_card_and_page(flags, run_main, monkeypatch, capsys):
    """Features are not kept, and a picture with a question in train.jsonl goes after the pass that decodes each."""
    keep = script.keep_features

    def keep_then_remove(files, *more):
        broken = keep(files, *more)
        next(iter(files[0].values())).path.unlink()
        return broken

    monkeypatch.setattr(script, "keep_features", keep_then_remove)
    run_main(**{**flags, "features_dir": "none", "epochs": 2})
    assert capsys.readouterr().err.count(f"left out {flags['train_file']}:1: picture broken: 0.png") == 1
    folder = flags["output_dir"]
    assert [record["left_out"] for record in log_of(folder)] == [0, 1, 1]
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    assert f"- picture broken, during the run: 1 ({flags['train_file']}:1)" in card
    assert "during the run" in page and f"{flags['train_file']}:1" in page


def test_a_broken_picture_is_told_before_training_and_in_card_and_page(flags, run_main, capsys):
    """As only pixels tell: its file begins as a picture does."""
    picture = flags["train_file"].with_name("0.png")
    picture.write_bytes(picture.read_bytes()[:-200])
    run_main(**flags)
    out = capsys.readouterr().out
    assert out.index(f"{flags['train_file']}:1") < out.index("Before training")
    card, page = ((flags["output_dir"] / name).read_text() for name in ("README.md", "report.html"))
    assert f"picture broken, as the files were read: 1 ({flags['train_file']}:1)" in card and "18 examples" in card
    assert f"{flags['train_file']}:1" in page


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_decoding_told_of_used_pictures_is_said_before_training_and_on_the_page(
    flags, run_main, monkeypatch, capsys, is_kept
):
    """By a second run, which decodes none of those that are kept, as by the first."""
    folder, grey = flags["train_file"].parent, np.linspace(0, 4095, 6000, dtype="u2").reshape(60, 100)
    for number in (0, 8):  # of train.jsonl:1 and valid.jsonl:1
        Image.fromarray(grey + number).save(folder / f"{number}.png")
    Image.new("RGB", (20, 10), "red").save(folder / "1.png")
    told = [
        f"pictures of more than 8 bits, scaled to 8: 2 ({flags['train_file']}:1, {flags['valid_file']}:1)",
        f"pictures of almost one colour, perhaps badly exported: 1 ({flags['train_file']}:2)",
    ]
    if not is_kept:
        flags["features_dir"] = "none"
    for _ in range(2):
        run_main(**flags, overwrite="true", valid_answers=0)
        out, page = capsys.readouterr().out, (flags["output_dir"] / "report.html").read_text()
        before = " ".join(out.partition("Before training")[0].split())
        for each in told:
            assert f"warning: {each}" in before and each in page
        if is_kept:
            monkeypatch.setattr(features, "examine", lambda *_: pytest.fail("a picture is decoded"))


def test_after_steps_that_are_not_finite_the_advice_works(flags, run_main, monkeypatch):
    """The message names lines and flags; with these flags the run begins again."""
    with monkeypatch.context() as patch:
        embed, factors = script.image_embeds, chain([1], repeat(math.nan))
        patch.setattr(script, "image_embeds", lambda *arguments: embed(*arguments) * next(factors))
        said = r"3 steps in a row .*train.jsonl:\d.* --overwrite true and a lower LEARNING_RATE than 3e-05"
        with pytest.raises(InputError, match=said):
            run_main(**{**flags, "checkpoint_minutes": 1e-9})
    with pytest.raises(InputError, match="LEARNING_RATE was 3e-05, is 1e-05"):
        run_main(**{**flags, "learning_rate": 1e-5})
    run_main(**{**flags, "learning_rate": 1e-5, "overwrite": "true"})
    assert log_of(flags["output_dir"])[1]["learning_rate"] == 1e-5


def test_an_epoch_whose_loss_is_not_finite_is_never_the_best(flags, run_main, monkeypatch, capsys):
    losses = iter([2.0, math.nan, 1.8, math.inf])
    monkeypatch.setattr(script, "evaluate", lambda *arguments: (next(losses), {}))
    run_main(**{**flags, "epochs": 3})
    assert [record["valid_loss"] for record in log_of(flags["output_dir"])] == [2.0, None, 1.8, None]
    out = capsys.readouterr().out
    assert "Best epoch: 2 of 3 (Validation Avg Loss 1.8000)" in out and "Validation Avg Loss: not finite" in out


def test_where_no_loss_is_finite_no_model_is_saved(flags, run_main, monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *arguments: (math.nan, {}))
    with pytest.raises(InputError, match="no epoch had a finite validation loss"):
        run_main(**flags)
    assert not (flags["output_dir"] / "config.json").exists() and len(log_of(flags["output_dir"])) == 2


def test_a_saved_model_is_trained_further_but_not_over_itself(flags, run_main, tmp_path):
    run_main(**flags)
    second = {**flags, "model_id": flags["output_dir"], "output_dir": tmp_path / "second"}
    run_main(**second)
    first, further = log_of(flags["output_dir"]), log_of(tmp_path / "second")
    assert further[0]["valid_loss"] == pytest.approx(first[1]["valid_loss"], rel=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second").config.model_type == "moondream1"
    before = (flags["output_dir"] / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="MODEL_ID .* lies in OUTPUT_DIR"):
        run_main(**{**second, "output_dir": flags["output_dir"], "overwrite": "true"})
    assert (flags["output_dir"] / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Signals before training, and the device
# ---------------------------------------------------------------------------------------------------------------------


def ask_to_end():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_pictures_are_encoded_ends_the_run_between_two_chunks(flags, run_main, monkeypatch, capsys):
    load, encoded = script.load_model, []

    def load_model(*release):
        model = load(*release)
        model.vision_encoder.register_forward_hook(lambda module, args, out: encoded.append(len(out)))
        model.vision_encoder.register_forward_hook(lambda *_: ask_to_end() if len(encoded) == 1 else None)
        return model

    monkeypatch.setattr(script, "load_model", load_model)
    with pytest.raises(SystemExit) as ended:
        run_main(**flags)
    assert ended.value.code == 128 + signal.SIGTERM and encoded == [8]  # of 11 pictures
    assert len(list(flags["features_dir"].rglob("*.safetensors"))) == 8  # which the next start need not encode
    assert "The same command goes on from there." in capsys.readouterr().out


def test_a_signal_while_pictures_are_looked_at_ends_the_run(flags, run_main, monkeypatch):
    find = script.find_pictures

    def find_pictures(path, *more):
        if path == flags["train_file"]:  # a second signal would end everything at once
            ask_to_end()
        return find(path, *more)

    monkeypatch.setattr(script, "find_pictures", find_pictures)
    monkeypatch.setattr(script, "load_model", lambda *release: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as ended:
        run_main(**flags)
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_broken_validation_picture_is_left_out_from_the_start(flags, run_main, capsys):
    picture = flags["valid_file"].with_name("8.png")
    picture.write_bytes(picture.read_bytes()[:-200])
    run_main(**flags)
    out, folder = capsys.readouterr().out, flags["output_dir"]
    lines = enumerate(flags["valid_file"].read_text().splitlines(), start=1)
    sources = [f"{flags['valid_file']}:{number}" for number, line in lines if "8.png" in line]
    assert all(out.index(source) < out.index("Before training") for source in sources)
    assert [record["left_out"] for record in log_of(folder)] == [0, 0]
    asked = [json.loads(line)["source"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(asked) == 7 - len(sources) and not set(asked) & set(sources)


def test_the_model_goes_to_the_device(flags, run_main, monkeypatch):
    load, moved = script.load_model, []

    def load_model(*release):
        model = load(*release)
        monkeypatch.setattr(model, "to", lambda device: (moved.append(device), model)[1])
        return model

    monkeypatch.setattr(script, "load_model", load_model)
    run_main(**flags)
    assert moved == [torch.device("cpu")]


def test_the_rate_in_the_log_is_that_of_the_epochs_last_step(flags, run_main):
    run_main(**{**flags, "lr_schedule": "linear", "learning_rate": 1e-3})  # 5 steps
    assert [record["learning_rate"] for record in log_of(flags["output_dir"])] == [None, pytest.approx(1e-3 / 5)]


def test_a_saved_model_names_its_saved_code(tiny, tokenizer, tmp_path):
    """And not the hub's, which the released configuration names."""
    tiny.config.auto_map = {"AutoModelForCausalLM": "moondream.Moondream", "AutoConfig": "moondream.MoondreamConfig"}
    script.save(tiny, tokenizer, {}, "the card", tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert names.keys() == tiny.config.auto_map.keys() | {"AutoConfig", "AutoModelForCausalLM"}
    assert {name.split(".")[0] for name in names.values()} == {"modeling_moondream2"}
    assert (tmp_path / "modeling_moondream2.py").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is handed from one part to the next
# ---------------------------------------------------------------------------------------------------------------------


def test_a_text_may_fill_what_a_picture_leaves_of_a_row(flags, run_main, monkeypatch):
    """2048 positions, less one for BOS and 81 for a picture of the small checkpoint."""
    given, read = [], script.read_data
    monkeypatch.setattr(script, "read_data", lambda *args: (given.append(args[1]), read(*args))[1])
    run_main(**flags)
    assert [config.max_text_tokens for config in given] == [2048 - 82]


def test_the_log_is_there_before_the_run_has_come_to_its_end(flags, run_main, monkeypatch):
    logs = []
    monkeypatch.setattr(script, "finish", lambda *args: logs.extend(log_of(flags["output_dir"])))
    run_main(**flags)
    assert [record["epoch"] for record in logs] == [0, 1]


def test_weights_are_loaded_in_bfloat16_to_train_and_to_ask():
    for model in (script.load_model(str(TINY), script.REVISION), ask.load(TINY)[0]):
        assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_the_page_tells_the_epoch_that_was_kept(flags, run_main, monkeypatch):
    told, losses = [], iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(script, "evaluate", lambda *args: (next(losses), {}))
    monkeypatch.setattr(script, "write_report", lambda path, facts: told.append(facts))
    run_main(**{**flags, "epochs": 3})
    assert told[0]["kept_epoch"] == 1 and [record["epoch"] for record in told[0]["history"]] == [0, 1, 2, 3]
