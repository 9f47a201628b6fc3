"""The report of a run: one HTML file with nothing to fetch that shows what the model answers and if training helped."""

import base64
import io
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import psutil
import torch
import transformers
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moondream2 import charts
from moondream2.charts import PALETTE, decimals, percent
from moondream2.files import write_text
from moondream2.modeling_moondream2 import Answer, upright_rgb
from moondream2.pace import duration
from moondream2.pictures import PictureError, open_picture
from moondream2.scoring import METRICS, baseline_accuracy, mean
from moondream2.summary import counted, left_out_by_reason, summarize
from moondream2.verdict import (
    accuracy_of,
    by_question,
    difference_in_words,
    in_points,
    is_changed,
    mistakes_of,
    reliability,
    sureness,
    times_of,
    trust_in_words,
    verdict,
    with_interval,
)

MOST_PICTURES = 300  # on the page; some 6 MB
MOST_MISTAKES = 4  # shown with pictures
MOST_EVIDENCE = 4  # pictures of a mistake
MOST_QUESTIONS = 20  # with a row, and a table, of their own
THUMBNAIL = (320, 240)  # pixels at most, width and height


def predictions(dataset, before: dict[str, Answer], after: dict[str, Answer]) -> list[dict]:
    """What was expected, answered before training and answered after it, for each example that was asked.

    Each metric says what it gives the two answers, under names like "before_correct" and "after_anls".

    Args:
        dataset: the validation examples and their pictures.
        before: {key of an example: what the model answered before training}; may be empty.
        after: the same for the model that is kept.
    """
    return [
        {
            "source": example.source,
            "image_path": example.image_path,
            "file": str(dataset.pictures[example.picture].path),
            "question": example.question,
            "answer": next(iter(example.answers), None),
            "answers": list(example.answers),
            **judged("before", before.get(example.key), example.answers),
            **judged("after", after[example.key], example.answers),
        }
        for example in dataset.examples
        if example.key in after
    ]


def judged(when, answer, right):
    """An answer and what each metric gives it, by names that begin with "before" or "after"; None where there is none.

    Args:
        right: the answers that count as right.
    """
    said, probability, is_cut = answer or (None, None, None)
    marks = {name: metric.score(said, right) if answer and right else None for name, metric in METRICS.items()}
    told = {"": said, "_probability": probability, "_cut": is_cut, **{f"_{name}": mark for name, mark in marks.items()}}
    return {f"{when}{name}": value for name, value in told.items()}


def means_of(predictions) -> dict[str, list[float | None]]:
    """{name of a metric: its means before and after training}; None where nothing was asked."""
    return {
        name: [mean(each[f"{when}_{name}"] for each in predictions) for when in ("before", "after")] for name in METRICS
    }


def machine(device: torch.device, seconds: float) -> dict:
    """Versions, device, time and peak memory of this process: the card's memory where there is one."""
    is_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if is_cuda else peak_memory()
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{device.type}, {os.cpu_count()} cores",
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak / 2**30, 2),
    }


def rates(record) -> dict:
    """How fast an epoch trained, of its record, as the page says it."""
    forms = {"questions_per_second": "{:,.3g}", "tokens_per_second": "{:,.0f}", "share_of_peak": "{:.0%}"}
    return {name: form.format(record[name]) for name, form in forms.items() if name in record}


def peak_memory():
    """The most bytes of memory that this process has held."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def facts(title, constants, summary, history, kept_epoch, sets, skipped, left_out, machine, names=None) -> dict:
    """What `write_report` shows, as plain data that JSON can hold.

    Args:
        title: the page's.
        constants: a namespace with the script's constants in lower case.
        summary: what `summarize` says of the data; None where a saved model is scored.
        history: the records of the epochs; a number is None where it was not taken, or was not finite.
        kept_epoch: the one whose weights are saved; None without training.
        sets: [{"name", "predictions"}] of the questions that were answered, each set under the name that a person knows
            it by, its predictions of `predictions`. The verdict rests on the last. With "baseline", what a model that
            never looks at a picture scores on it; that of the validation set stands in the summary.
        skipped: (source, reason) of the lines left out as the files were read.
        left_out: (source, reason) of those left out later.
        machine: of `machine`.
        names: {"before", "after"} where these are the answers of two models; None where one was trained in between.
    """
    return {
        "title": title,
        "model": {"id": constants.model_id, "revision": constants.revision},
        "history": history,
        "kept_epoch": kept_epoch,
        "data": summary,
        "sets": sets,
        "names": names,
        "left_out": left_out_by_reason(skipped, left_out),
        "constants": {name.upper(): value for name, value in vars(constants).items()},
        "machine": machine,
    }


def sets_of(progress, train, valid, test=None) -> list[dict]:
    """A run's answers to the validation questions and, where there is a test file, to its own: the sets of `facts`."""
    sets = [{"name": "validation", "predictions": predictions(valid, progress.answers_before, progress.answers_best)}]
    if test:
        baseline = baseline_accuracy(train.examples, test.examples)
        answers = predictions(test, progress.test_before, progress.test_best)
        sets.append({"name": "test", "predictions": answers, "baseline": baseline})
    return sets


def facts_of_run(constants, progress, train, valid, sets, device, test=None) -> dict:
    """`facts` of a run that has come to its end."""
    return facts(
        title=Path(constants.output_dir).name,
        constants=constants,
        summary=summarize(train, valid, test),
        history=progress.history,
        kept_epoch=progress.best_epoch,
        sets=sets,
        skipped=[*train.skipped, *valid.skipped, *(test.skipped if test else [])],
        left_out=progress.left_out,
        machine=machine(device, sum(record["seconds"] for record in progress.history)) | rates(progress.history[-1]),
    )


@cache
def template():
    """Of the page, with what it turns numbers into words by."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.filters |= {"percent": percent, "decimals": decimals, "duration": duration, "counted": counted}
    templates.filters |= {
        "sureness": sureness,
        "with_interval": with_interval,
        "times": times_of,
        "in_points": in_points,
    }
    return templates.get_template("report.html.jinja")


def write_report(path: Path, run: dict) -> None:
    """Writes the report of a run, or of scoring a saved model, whole or not at all.

    Args:
        path: of the HTML file.
        run: of `facts`. Without training, the history has one entry at most and each prediction's "before" is None.
    Raises:
        InputError: the file can't be written.
    """
    scores, sets = scores_of(run), [judged_set(each) for each in run["sets"]]
    pictures, unshown = choose([picture for each in reversed(run["sets"]) for picture in by_picture(each)])
    page = template().render(
        run=run,
        scores=scores,
        sets=sets,
        metrics=METRICS,
        difference=run["names"] and difference_in_words(run["sets"][-1]["predictions"], run["names"]),
        names=run["names"] or {"before": "Before", "after": "After" if scores["is_trained"] else "Answer"},
        filters=filters(run, scores),
        headline=headline(run, scores),
        result_warnings=list(result_warnings(scores)),
        charts=list(charts.of_epochs(run)) if scores["is_trained"] else [],
        pictures=pictures,
        cards={(picture["set"], picture["file"]): picture for picture in pictures},
        most_evidence=MOST_EVIDENCE,
        unshown=unshown,
        palette=PALETTE,
        nonce=secrets.token_urlsafe(16),
    )
    write_text(Path(path), page.encode("utf-8", "replace").decode("utf-8"))  # a path may hold half a character


def judged_set(judged):
    """What the page shows of a set: its name, and all that `moondream2.verdict` says of its predictions."""
    predictions = judged["predictions"]
    questions = by_question(predictions)
    return {
        "name": judged["name"],
        "asked": len(predictions),
        "wrong": sum(each["after_correct"] is False for each in predictions),
        "accuracy": accuracy_of(predictions),
        "before": accuracy_of(predictions, "before"),
        "questions": questions[:MOST_QUESTIONS],
        "more_questions": len(questions[MOST_QUESTIONS:]),
        "mistakes": mistakes_of(questions)[:MOST_MISTAKES],
        "trust": trust_in_words(predictions),
        "reliability": reliability(predictions),
        "charts": list(charts.of_trust(predictions)),
        "means": means_of(predictions),
    }


def scores_of(run):
    """What a verdict rests on: the last set's accuracy and metrics, losses, and the baseline."""
    history, judged = run["history"], run["sets"][-1] if run["sets"] else {"name": None, "predictions": []}
    epochs = {record["epoch"]: record for record in history}
    first, last = epochs.get(0, {}) if any(epochs) else {}, history[-1] if history else {}
    kept = epochs.get(run["kept_epoch"], last)
    summarized = run["data"]["baseline_accuracy"] if run["data"] and judged["name"] == "validation" else None
    return {
        "is_trained": any(epochs),
        "kept": kept,
        "last": last,
        "before": accuracy_of(judged["predictions"], "before"),
        "after": accuracy_of(judged["predictions"]),
        "loss_before": first.get("valid_loss"),
        "loss_after": kept.get("valid_loss"),
        "baseline": judged.get("baseline", summarized),
    }


def headline(run, scores):
    """What came of it, in a sentence: of the last set's accuracy, or where none was taken of the validation loss."""
    if run["sets"] and (told := verdict(run["sets"][-1]["predictions"], run["names"])):
        return f"{told}."
    before, after = scores["loss_before"], scores["loss_after"]
    if before is None or after is None:
        return "Nothing was measured." if after is None else f"Validation loss is {decimals(after)}."
    if decimals(before) == decimals(after):
        return f"Validation loss stayed at {decimals(after)}."
    return f"Validation loss {'rose' if after > before else 'fell'} from {decimals(before)} to {decimals(after)}."


def result_warnings(scores):
    """Sentences on what a person should know before trusting the model."""
    before, after, baseline = scores["before"], scores["after"], scores["baseline"]
    if None not in (after, baseline) and after.value <= baseline:
        who = "Training did not beat" if scores["is_trained"] else "The model does not beat"
        yield f"{who} the baseline: giving each question its most frequent answer scores {percent(baseline)}."
    elif None not in (after, baseline) and after.low is not None and after.low <= baseline:
        yield (
            f"The interval of its accuracy, {with_interval(after)}, holds the baseline: giving each question its most "
            f"frequent answer scores {percent(baseline)}."
        )
    if scores["is_trained"] and None not in (before, after) and after.value < before.value:
        told = f"Accuracy fell from {percent(before.value)} to {percent(after.value)}"
        yield f"{told}: the model answered better before training."
    kept, last = scores["kept"], scores["last"]
    valid, train = [(kept.get(name), last.get(name)) for name in ("valid_loss", "train_loss")]
    if None not in (*valid, *train) and valid[0] < valid[1] and train[0] > train[1]:
        yield (
            f"It overfits after epoch {kept['epoch']}: by the last epoch, validation loss rose from "
            f"{valid[0]:.4f} to {valid[1]:.4f} while training loss fell from {train[0]:.4f} to {train[1]:.4f}."
        )


def by_picture(judged):
    """[{set, image_path, file, questions}] of a set, each question with the filters that it stands under, in order."""
    pictures = {}
    for each in judged["predictions"]:
        picture = {"set": judged["name"], "image_path": each["image_path"], "file": each["file"], "questions": []}
        picture = pictures.setdefault(each["file"], picture)
        picture["questions"].append({**each, "states": states(each)})
    return list(pictures.values())


def filters(run, scores):
    """{state of a question: what the page calls it}, of those that its pictures can be filtered by."""
    found = {"all": "All", "wrong": "Wrong now"}
    if names := run["names"]:
        better = {"newly-right": f"Right only: {names['after']}", "newly-wrong": f"Right only: {names['before']}"}
        return {"all": "All", "changed": "Different answers", **better}
    if scores["is_trained"]:
        found |= {"newly-right": "Newly right", "newly-wrong": "Newly wrong"}
    return found


def states(prediction):
    before, after = prediction["before_correct"], prediction["after_correct"]
    found = ["wrong"] if after is False else []
    if before is not None and before != after:
        found.append("newly-right" if after else "newly-wrong")
    if prediction["before"] is not None and is_changed(prediction):
        found.append("changed")
    return found


def choose(pictures):
    """The pictures for the page, with thumbnails, and those not shown: if there are too many, the uneventful ones."""
    by_interest = sorted(
        pictures, key=lambda picture: not any({*q["states"]} - {"changed"} for q in picture["questions"])
    )
    chosen, unshown = by_interest[:MOST_PICTURES], by_interest[MOST_PICTURES:]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        thumbnails = pool.map(thumbnail, [picture["file"] for picture in chosen])
        made = [
            {**picture, "id": f"picture-{number}", "thumbnail": each}
            for number, (picture, each) in enumerate(zip(chosen, thumbnails, strict=True), start=1)
        ]
        return made, unshown


def thumbnail(file):
    """A picture as a small JPEG in base64, upright; None where the file is gone or broken by now."""

    def shrink(image):
        image = upright_rgb(image)
        image.thumbnail(THUMBNAIL)
        image.save(small := io.BytesIO(), "JPEG", quality=80)
        return base64.b64encode(small.getvalue()).decode()

    try:
        return open_picture(Path(file), shrink, draft=[2 * side for side in THUMBNAIL])[0]
    except PictureError:
        return None
