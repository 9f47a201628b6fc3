"""TEST_FILE: answered before training and once at its end, by the weights that are saved, with no say in anything."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import features, launch, log
from moondream2.card import figures_of_test
from moondream2.checkpoints import Interrupted, Progress
from moondream2.cli import InputError
from moondream2.modeling_moondream2 import Answer
from moondream2.pictures import pixels_of
from moondream2.scoring import baseline_accuracy
from tests.shared import TINY, dataset, untimed, write_lines
from tests.test_wiring import judged


@pytest.fixture
def flags(data, test_file, smallest):
    flags = {"model_id": smallest[TINY], "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl"}
    flags |= {
        "epochs": 2,
        "test_file": test_file,
        "output_dir": data / "out",
        "features_dir": data / "features",
        "batch_size": 4,
    }
    return {**flags, "learning_rate": 1e-3, "valid_answers": 2}


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def results(folder):
    """What a run leaves, without the times: the log, both files of answers, and the weights."""
    log = lines_of(folder / "training_log.jsonl")
    answers = [lines_of(folder / name) for name in ("predictions.jsonl", "test_predictions.jsonl")]
    return [[untimed(each) for each in log], *answers, (folder / "model.safetensors").read_bytes()]


# ---------------------------------------------------------------------------------------------------------------------
# Its figures
# ---------------------------------------------------------------------------------------------------------------------


def said_by(model, tokenizer, test, example):
    embeds = model.encode_image([pixels_of(test.pictures[example.picture], model.vision_encoder.preprocess)])
    return model.answer_question(embeds, example.question, tokenizer)


def test_its_figures_are_those_of_the_model_as_it_came_and_of_the_saved_one(
    flags, run_main, monkeypatch, tiny, tokenizer, capsys
):
    """Against both models asked one question at a time; all of them, though VALID_ANSWERS is less. In float32."""
    load = script.load_model
    monkeypatch.setattr(script, "load_model", lambda *release: load(*release).float())
    run_main(**flags | {"model_id": TINY}, tracker="tensorboard")
    folder, test = flags["output_dir"], dataset(flags["test_file"], tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before, after = (judged(model, tokenizer, test) for model in (tiny.bfloat16().float(), saved))
    records = lines_of(folder / "training_log.jsonl")
    best = min(records[1:], key=lambda record: record["valid_loss"])
    for record, expected in ((records[0], before), (best, after)):
        assert record["test_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)
        assert record["test_accuracy"] == expected["valid_accuracy"]
    assert [("test_loss" in record) for record in records] == [record in (records[0], best) for record in records]

    answers = lines_of(folder / "test_predictions.jsonl")
    assert [each["source"] for each in answers] == [example.source for example in test]
    assert len(lines_of(folder / "predictions.jsonl")) == 2
    for when, expected in (("before", before), ("after", after)):
        assert sum(each[f"{when}_correct"] for each in answers) / len(answers) == expected["valid_accuracy"]
    for when, model in (("before", tiny), ("after", saved)):
        assert [each[when] for each in answers] == [said_by(model, tokenizer, test, example) for example in test]
    assert all(each["before"] != each["after"] for each in answers)

    baseline = baseline_accuracy(dataset(flags["train_file"], tokenizer).examples, test.examples)
    loss, accuracy, start = best["test_loss"], best["test_accuracy"], records[0]["test_accuracy"]
    out = capsys.readouterr().out.splitlines()
    said = [
        f"Test file before training: Test Avg Loss: {records[0]['test_loss']:.4f}, Test accuracy: {start:.1%}"
        f" (baseline {baseline:.1%})",
        f"Test file with epoch {best['epoch']}'s weights: Test Avg Loss: {loss:.4f}, Test accuracy: {accuracy:.1%}"
        f" (before training {start:.1%}, baseline {baseline:.1%})",
    ]
    assert [line for line in out if line.startswith("Test file")] == said

    events = EventAccumulator(str(folder / launch.TRACKED)).Reload()
    for name in ("test_loss", "test_accuracy"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step, pytest.approx(record[name])) for step, record in ((0, records[0]), (10, best))]
        assert values == expected


def test_card_and_page_tell_of_it_apart(flags, run_main):
    run_main(**flags)
    folder = flags["output_dir"]
    first, *records = lines_of(folder / "training_log.jsonl")
    best = min(records, key=lambda record: record["valid_loss"])
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    assert f"- {flags['test_file']}: 5 examples on 2 pictures" in card
    assert f"{flags['test_file']} had no say in training: its figures are what to expect on other pictures." in card
    for when, record in (("before", first), ("after", best)):
        assert f"| {when} | {record['test_loss']:.4f} | {record['test_accuracy']:.1%} |" in card
    assert f'Test <span class="mono muted">{flags["test_file"]}</span>' in page
    assert all(each["source"] in page for each in lines_of(folder / "test_predictions.jsonl"))
    train, valid, test = (dataset(flags[f"{name}_file"]).examples for name in ("train", "valid", "test"))
    assert baseline_accuracy(train, test) == 0.0 < baseline_accuracy(train, valid)
    assert "without a look at the picture, scores 0.0%" in page


RECORDS = [
    {"epoch": 0, "test_loss": 3.0, "test_accuracy": 0.125},
    {"epoch": 1, "test_loss": None, "test_accuracy": 0.75},
    {"epoch": 2},
]


def test_the_card_has_the_kept_epochs_figures():
    text = figures_of_test(SimpleNamespace(path="t.jsonl"), SimpleNamespace(history=RECORDS, best_epoch=1))
    assert text.splitlines()[-2:] == ["| before | 3.0000 | 12.5% |", "| after | – | 75.0% |"]


def test_the_line_of_it(capsys):
    for record in RECORDS[:2]:
        log.test(record, RECORDS[0], 0.25)
    assert capsys.readouterr().out.splitlines() == [
        "Test file before training: Test Avg Loss: 3.0000, Test accuracy: 12.5% (baseline 25.0%)",
        "Test file with epoch 1's weights: Test Avg Loss: not finite, Test accuracy: 75.0% "
        "(before training 12.5%, baseline 25.0%)",
    ]
    assert log.scores_of_test(RECORDS[1]) == {"test_accuracy": 0.75}


# ---------------------------------------------------------------------------------------------------------------------
# No say
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures went through the vision encoder, call by call."""
    load, calls = script.load_model, []

    def load_model(*release):
        model = load(*release)
        model.vision_encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        return model

    monkeypatch.setattr(script, "load_model", load_model)
    return calls


def test_it_changes_nothing_of_a_run(flags, run_main, monkeypatch, encoded, tmp_path):
    """Nor of the features, whose last bits can hang on which pictures are encoded together; it shares one with each."""
    shared = [{"image_path": name, "question": "Where?", "answer": "Here."} for name in ("3.png", "9.png")]
    write_lines(flags["test_file"], [*lines_of(flags["test_file"]), *shared])
    monkeypatch.setattr(features, "CHUNK", 5)
    with_it, without, others = flags["output_dir"], tmp_path / "without", tmp_path / "others"
    run_main(**flags)
    assert encoded == [5, 3, 3, 2]  # of 8 pictures, of 3 and of its own
    encoded.clear()
    run_main(**{**flags, "test_file": "none", "output_dir": without, "features_dir": others})
    assert encoded == [5, 3, 3]
    stored = list(others.rglob("*.safetensors"))
    assert len(stored) == 11
    assert all(file.read_bytes() == (flags["features_dir"] / file.relative_to(others)).read_bytes() for file in stored)
    assert (with_it / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()
    assert lines_of(with_it / "predictions.jsonl") == lines_of(without / "predictions.jsonl")
    names = ("epoch", "train_loss", "valid_loss", "valid_accuracy")
    logs = ([[each[name] for name in names] for each in lines_of(f / "training_log.jsonl")] for f in (with_it, without))
    assert next(logs) == next(logs)
    assert not (without / "test_predictions.jsonl").exists()


def test_the_validation_chooses_the_weights_that_answer_it(flags, run_main, monkeypatch):
    """The second epoch's, by losses of a run that overfitted, whatever the test says; also the saved bits are those."""
    losses = {"valid": iter([9.0, 1.7609, 1.7252, 1.7986]), "test": iter([1.0, 7.0])}
    seen = []

    def evaluated(model, tokenizer, batches, asked):
        sources = {example.source for batch in batches for row in batch["rows"] for example in row}
        which = "test" if any(source.startswith(str(flags["test_file"])) for source in sources) else "valid"
        seen.append((which, {name: tensor.clone() for name, tensor in model.text_model.state_dict().items()}))
        return next(losses[which]), {key: Answer("a box 0", 0.5, False) for key in asked}

    monkeypatch.setattr(script, "evaluate", evaluated)
    run_main(**{**flags, "epochs": 3, "patience": 1})
    assert [which for which, _ in seen] == ["valid", "test", "valid", "valid", "valid", "test"]
    saved = load_file(flags["output_dir"] / "model.safetensors")
    for name, tensor in seen[-1][1].items():
        assert torch.equal(tensor, seen[3][1][name]) and torch.equal(tensor, saved[f"text_model.{name}"])
    assert any(not torch.equal(tensor, seen[4][1][name]) for name, tensor in seen[-1][1].items())
    records = lines_of(flags["output_dir"] / "training_log.jsonl")
    assert [record.get("test_loss") for record in records] == [1.0, None, 7.0, None]


def test_without_a_best_epoch_it_is_not_answered_at_the_end(flags, run_main, monkeypatch):
    calls = []

    def evaluated(model, tokenizer, batches, asked):
        calls.append(len(asked))
        return math.nan, {key: Answer("a box 0", 0.5, False) for key in asked}

    monkeypatch.setattr(script, "evaluate", evaluated)
    with pytest.raises(InputError, match="no epoch had a finite validation loss"):
        run_main(**flags)
    assert calls == [2, 5, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Once
# ---------------------------------------------------------------------------------------------------------------------


def failing_at(monkeypatch, call, error):
    """The evaluation of this number, counted from 1, raises."""
    evaluate, calls = script.evaluate, []

    def evaluated(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise error
        return evaluate(*arguments)

    monkeypatch.setattr(script, "evaluate", evaluated)


@pytest.fixture
def whole(flags, run_main, tmp_path):
    run_main(**{**flags, "output_dir": tmp_path / "whole"})
    return results(tmp_path / "whole")


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (KeyboardInterrupt(), 2),
        pytest.param(KeyboardInterrupt(), 5, marks=pytest.mark.slow),
        pytest.param(Interrupted(signal.SIGTERM), 2, marks=pytest.mark.slow),
        (Interrupted(signal.SIGTERM), 5),
    ],
    ids=["killed before training", "killed at the end", "stopped before training", "stopped at the end"],
)
def test_killed_or_stopped_while_it_is_answered_it_comes_to_the_same(
    flags, whole, run_main, monkeypatch, capsys, error, call
):
    """Evaluations: validation, test, two more validations, test."""
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        failing_at(patch, call, error)
        run_main(**flags)
    checkpoints = list(flags["output_dir"].glob("checkpoints/epoch-*"))
    assert [path.name for path in checkpoints] == ([] if call == 2 else ["epoch-000003-step-00000000"])
    capsys.readouterr()
    run_main(**flags)
    assert results(flags["output_dir"]) == whole
    assert ("Test file before training" in capsys.readouterr().out) is (call == 2)


def stopped(*arguments):
    raise InputError("stopped")


def test_once_answered_it_stays_what_it_is(flags, whole, run_main, monkeypatch, capsys):
    """Killed before the model is saved, the run neither asks again nor trains on, though EPOCHS has become more."""
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped"):
        patch.setattr(script, "finish", stopped)
        run_main(**flags)
    monkeypatch.setattr(script, "evaluate", lambda *arguments: pytest.fail("it is asked again"))
    monkeypatch.setattr(script, "train_epoch", lambda *arguments: pytest.fail("it trains on"))
    capsys.readouterr()
    run_main(**{**flags, "epochs": 9})
    best = min(whole[0][1:], key=lambda record: record["valid_loss"])["epoch"]
    said = f"The test file has been answered by epoch {best}'s weights: no more epochs are trained."
    assert capsys.readouterr().out.splitlines().count(said) == 1
    assert results(flags["output_dir"]) == whole


@pytest.mark.parametrize("other", ["changed", "none"])
def test_a_run_goes_on_with_the_test_file_that_it_began_with(flags, run_main, monkeypatch, other):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped"):
        patch.setattr(script, "finish", stopped)
        run_main(**flags)
    if other == "changed":
        flags["test_file"].write_text(flags["test_file"].read_text().replace("A box", "The box"))
    else:
        flags["test_file"] = "none"
    said = f"other settings .TEST_FILE was [0-9a-f]{{16}}, is {'None' if other == 'none' else '[0-9a-f]{16}'}.: give"
    with pytest.raises(InputError, match=said) as error:
        run_main(**flags)
    assert "\n" not in str(error.value)


def test_a_run_that_replaces_another_leaves_no_answers_of_it(flags, run_main):
    run_main(**flags)
    run_main(**{**flags, "test_file": "none", "overwrite": "true"})
    assert not (flags["output_dir"] / "test_predictions.jsonl").exists()
    assert "test_loss" not in (flags["output_dir"] / "training_log.jsonl").read_text()
    mine = flags["output_dir"].with_name("mine")
    mine.mkdir()
    (mine / ".finetune_moondream.json").write_text('{"version": 1, "names": []}')
    (mine / "test_predictions.jsonl").write_text("mine")
    with pytest.raises(InputError, match="has files of yours where a run would write .test_predictions.jsonl"):
        run_main(**{**flags, "output_dir": mine})
    assert (mine / "test_predictions.jsonl").read_text() == "mine"


def test_progress_keeps_its_answers():
    """As JSON brings them back."""
    progress = Progress({}, history=[{"epoch": 0}, {"epoch": 1}], epoch=2)
    assert not progress.is_tested
    progress.enter_test(2.0, 0.25, {"0123": Answer("No", 0.5, True)})
    assert progress.history == [{"epoch": 0, "test_loss": 2.0, "test_accuracy": 0.25}, {"epoch": 1}]
    assert not progress.is_tested and progress.goes_on(2, None)
    progress.best_epoch = 1
    assert not progress.is_tested and progress.goes_on(2, None)
    progress.enter_test(math.inf, 0.5, {"0123": Answer("Yes", 0.75, False)})
    assert progress.history[1] == {"epoch": 1, "test_loss": None, "test_accuracy": 0.5}
    again = Progress(**json.loads(json.dumps(vars(progress))))
    assert again == progress and again.test_before["0123"].is_cut and again.test_best["0123"].text == "Yes"
    assert again.is_tested and not again.goes_on(2, None)


# ---------------------------------------------------------------------------------------------------------------------
# What may be in it
# ---------------------------------------------------------------------------------------------------------------------


def test_an_empty_one_is_one_line(flags, run_main, monkeypatch):
    flags["test_file"].write_text("\n")
    monkeypatch.setattr(script, "load_model", lambda *release: pytest.fail("it goes on"))
    with pytest.raises(InputError) as error:
        run_main(**flags)
    assert str(error.value) == f"{flags['test_file']} has no example that can be used"


def test_a_missing_picture_is_skipped_counted_and_named(flags, run_main, capsys):
    lines = lines_of(flags["test_file"])
    write_lines(flags["test_file"], [*lines, {**lines[0], "image_path": "gone.png"}])
    run_main(**flags)
    out, folder = capsys.readouterr().out, flags["output_dir"]
    place = f"{flags['test_file']}:6"
    assert f"{flags['test_file']}: 1 of 6 lines skipped\n  {place}: picture not found: gone.png" in out
    assert f"- picture not found, as the files were read: 1 ({place})" in (folder / "README.md").read_text()
    assert place in (folder / "report.html").read_text()
    assert len(lines_of(folder / "test_predictions.jsonl")) == 5


def test_a_broken_picture_is_left_out_from_the_start(flags, run_main, capsys):
    """As only its pixels tell."""
    picture = flags["test_file"].with_name("12.png")
    picture.write_bytes(picture.read_bytes()[:-200])
    run_main(**flags)
    sources = [f"{flags['test_file']}:{n}" for n, line in enumerate(lines_of(flags["test_file"]), 1)]
    gone = [
        each for each, line in zip(sources, lines_of(flags["test_file"]), strict=True) if "12" in line["image_path"]
    ]
    out = capsys.readouterr().out
    assert gone and all(out.index(each) < out.index("Before training") for each in gone)
    answered = [each["source"] for each in lines_of(flags["output_dir"] / "test_predictions.jsonl")]
    assert answered == [each for each in sources if each not in gone]


def test_one_of_almost_one_colour_is_told(flags, run_main, capsys):
    Image.new("RGB", (20, 10), "red").save(flags["test_file"].with_name("11.png"))
    run_main(**flags)
    out, page = capsys.readouterr().out, (flags["output_dir"] / "report.html").read_text()
    told = f"pictures of almost one colour, perhaps badly exported: 1 ({flags['test_file']}:1)"
    assert f"warning: {told}" in " ".join(out.split()) and told in page


def test_one_picture_and_one_question(flags, run_main, capsys):
    write_lines(flags["test_file"], lines_of(flags["test_file"])[:1])
    run_main(**flags)
    (answer,) = lines_of(flags["output_dir"] / "test_predictions.jsonl")
    first = lines_of(flags["output_dir"] / "training_log.jsonl")[0]
    assert first["test_accuracy"] == float(answer["before_correct"])
    assert "test.jsonl has only 1 example: one answer moves the accuracy by 100%" in capsys.readouterr().out


def test_features_of_its_pictures_are_stored_as_the_others_are(flags, run_main, monkeypatch, capsys):
    run_main(**{**flags, "epochs": 1})
    assert "Encoding 13 pictures" in capsys.readouterr().out
    assert len(list(flags["features_dir"].rglob("*.safetensors"))) == 13


def test_together_with_a_held_out_tenth(flags, run_main, data, capsys):
    run_main(**{**flags, "valid_file": "none"})
    out = capsys.readouterr().out
    assert "No VALID_FILE: 1 of 8 pictures" in out and "Test file with epoch" in out
    heading = next(line for line in out.splitlines() if line.lstrip().startswith("train.jsonl "))
    assert heading.split() == ["train.jsonl", "a", "tenth", "of", "train.jsonl", "test.jsonl"]
