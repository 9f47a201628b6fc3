"""The report of a run: one HTML file with nothing to fetch that shows what the model answers and if training helped."""

import base64
import io
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
import transformers
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moondream2.files import write_text
from moondream2.modeling_moondream2 import Answer, upright_rgb
from moondream2.pictures import PictureError, open_picture
from moondream2.scoring import METRICS, mean
from moondream2.summary import counted, left_out_by_reason, summarize

MOST_PICTURES = 300  # on the page; some 6 MB
THUMBNAIL = (320, 240)  # pixels at most, width and height

# The colours of the page and of its charts, for a browser set to light and for one set to dark.
PALETTE = {
    "light": {
        "page": "#f7f7f5",
        "card": "#ffffff",
        "well": "#eeeeea",
        "ink": "#1b1d22",
        "muted": "#5f636c",
        "line": "#e2e2dd",
        "first": "#2459c9",
        "second": "#a85a00",
        "right": "#17703f",
        "wrong": "#b3261e",
        "notice": "#fdf4dc",
        "notice-line": "#d9a400",
    },
    "dark": {
        "page": "#121316",
        "card": "#1b1d22",
        "well": "#24272d",
        "ink": "#e8e9ed",
        "muted": "#a2a6b0",
        "line": "#32353d",
        "first": "#86abff",
        "second": "#f0a55a",
        "right": "#67cf95",
        "wrong": "#ff8f86",
        "notice": "#2a2415",
        "notice-line": "#c99a1a",
    },
}
CURVES = {  # of a number in the history: its name, its colour, its style
    "train_loss": ("training", "second", "s--"),
    "valid_loss": ("validation", "first", "o-"),
    "valid_accuracy": ("validation", "first", "o-"),
}


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


def peak_memory():
    """The most bytes of memory that this process has held."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def facts(title, constants, summary, history, kept_epoch, sets, skipped, left_out, machine) -> dict:
    """What `write_report` shows, as plain data that JSON can hold.

    Args:
        title: the page's.
        constants: a namespace with the script's constants in lower case.
        summary: what `summarize` says of the data; None where a saved model is scored.
        history: the records of the epochs; a number is None where it was not taken, or was not finite.
        kept_epoch: the one whose weights are saved; None without training.
        sets: [{"name", "predictions"}] of the questions that were answered, each set under the name that a person knows
            it by, its predictions of `predictions`. The verdict rests on the last.
        skipped: (source, reason) of the lines left out as the files were read.
        left_out: (source, reason) of those left out later.
        machine: of `machine`.
    """
    return {
        "title": title,
        "model": {"id": constants.model_id, "revision": constants.revision},
        "history": history,
        "kept_epoch": kept_epoch,
        "data": summary,
        "sets": sets,
        "left_out": left_out_by_reason(skipped, left_out),
        "constants": {name.upper(): value for name, value in vars(constants).items()},
        "machine": machine,
    }


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
        machine=machine(device, sum(record["seconds"] for record in progress.history)),
    )


def write_report(path: Path, run: dict) -> None:
    """Writes the report of a run, or of scoring a saved model, whole or not at all.

    Args:
        path: of the HTML file.
        run: of `facts`. Without training, the history has one entry at most and each prediction's "before" is None.
    Raises:
        InputError: the file can't be written.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.filters |= {"percent": percent, "decimals": decimals, "duration": duration, "counted": counted}
    scores = scores_of(run)
    predictions = run["sets"][-1]["predictions"] if run["sets"] else []
    pictures, unshown = choose(by_picture(predictions))
    page = templates.get_template("report.html.jinja").render(
        run=run,
        scores=scores,
        predictions=predictions,
        metrics=METRICS,
        verdict=verdict(scores),
        result_warnings=list(result_warnings(scores)),
        charts=list(charts(run, scores["baseline"])) if scores["is_trained"] else [],
        pictures=pictures,
        unshown=unshown,
        palette=PALETTE,
        nonce=secrets.token_urlsafe(16),
    )
    write_text(Path(path), page.encode("utf-8", "replace").decode("utf-8"))  # a path may hold half a character


def percent(fraction):
    return "–" if fraction is None else f"{fraction:.1%}"


def decimals(number):
    return "–" if number is None else f"{number:.4f}"


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def scores_of(run):
    """What a verdict rests on: metrics and loss before training and of the kept epoch, and the baseline."""
    history, predictions = run["history"], run["sets"][-1]["predictions"] if run["sets"] else []
    epochs = {record["epoch"]: record for record in history}
    first, last = epochs.get(0, {}) if any(epochs) else {}, history[-1] if history else {}
    kept = epochs.get(run["kept_epoch"], last)
    means = means_of(predictions)
    taken = [record.get("valid_accuracy") for record in (first, kept)]  # also of pictures that are gone by now
    means["correct"] = [now if then is None else then for then, now in zip(taken, means["correct"], strict=True)]
    before, after = means["correct"]
    return {
        "is_trained": any(epochs),
        "kept": kept,
        "last": last,
        "before": before,
        "after": after,
        "means": means,
        "loss_before": first.get("valid_loss"),
        "loss_after": kept.get("valid_loss"),
        "baseline": run["data"]["baseline_accuracy"] if run["data"] else None,
    }


def verdict(scores):
    """What came of it, in a sentence."""
    name, before, after, form = "Accuracy", scores["before"], scores["after"], percent
    if after is None:
        name, before, after, form = "Validation loss", scores["loss_before"], scores["loss_after"], decimals
    if before is None:
        return f"{name} is {form(after)}." if after is not None else "Nothing was measured."
    if form(before) == form(after):
        return f"{name} stayed at {form(after)}."
    return f"{name} {'rose' if after > before else 'fell'} from {form(before)} to {form(after)}."


def result_warnings(scores):
    """Sentences on what a person should know before trusting the model."""
    before, after, baseline = scores["before"], scores["after"], scores["baseline"]
    if None not in (after, baseline) and after <= baseline:
        who = "Training did not beat" if scores["is_trained"] else "The model does not beat"
        yield f"{who} the baseline: giving each question its most frequent answer scores {percent(baseline)}."
    if None not in (before, after) and after < before:
        yield f"Accuracy fell from {percent(before)} to {percent(after)}: the model answered better before training."
    kept, last = scores["kept"], scores["last"]
    valid, train = [(kept.get(name), last.get(name)) for name in ("valid_loss", "train_loss")]
    if None not in (*valid, *train) and valid[0] < valid[1] and train[0] > train[1]:
        yield (
            f"It overfits after epoch {kept['epoch']}: by the last epoch, validation loss rose from "
            f"{valid[0]:.4f} to {valid[1]:.4f} while training loss fell from {train[0]:.4f} to {train[1]:.4f}."
        )


def charts(run, baseline):
    """The curves of loss and, where it was measured, of accuracy."""
    yield chart("Loss by epoch", run, ["train_loss", "valid_loss"])
    if any(record.get("valid_accuracy") is not None for record in run["history"]):
        yield chart("Accuracy by epoch", run, ["valid_accuracy"], baseline)


def chart(title, run, names, baseline=None):
    """A chart of the numbers of these names: {title, alt: what it says, light and dark: an SVG in base64}."""
    pictures = {scheme: draw(run, names, baseline, colours) for scheme, colours in PALETTE.items()}
    parts = [title, *(in_words(run["history"], name) for name in names)]
    parts += [] if baseline is None else [f"baseline: {percent(baseline)}"]
    parts += [] if run["kept_epoch"] is None else [f"kept: epoch {run['kept_epoch']}"]
    return {"title": title, "alt": ". ".join(parts) + ".", **pictures}


def in_words(history, name):
    """What a curve says: its first, best and last number."""
    known = [(record["epoch"], record[name]) for record in history if record.get(name) is not None]
    if not known:
        return f"{CURVES[name][0]}: no numbers"
    form, better = (percent, max) if name == "valid_accuracy" else (decimals, min)
    points = {"first": known[0], "best": better(known, key=lambda point: point[1]), "last": known[-1]}
    told = [f"{which} {form(value)} (epoch {epoch})" for which, (epoch, value) in points.items()]
    return f"{CURVES[name][0]}: {', '.join(told)}"


def draw(run, names, baseline, colours):
    """A line chart in these colours, as an SVG in base64; a number that is missing leaves a gap."""
    figure = Figure(figsize=(4.3, 2.7), layout="constrained")
    axes = figure.add_subplot()
    epochs = [record["epoch"] for record in run["history"]]
    for name in names:
        label, colour, style = CURVES[name]
        values = [record.get(name) for record in run["history"]]
        axes.plot(epochs, values, style, color=colours[colour], markersize=5, label=label)
    if baseline is not None:
        axes.axhline(baseline, color=colours["muted"], linestyle=":", label="baseline")
    if run["kept_epoch"] is not None:
        label = f"kept: epoch {run['kept_epoch']}"
        axes.axvline(run["kept_epoch"], color=colours["muted"], linewidth=6, alpha=0.25, label=label)
    axes.set_xlabel("epoch", color=colours["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "valid_accuracy" in names:
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.grid(axis="y", color=colours["line"])
    axes.tick_params(colors=colours["muted"], length=0)
    axes.spines[:].set_visible(False)
    legend = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "frameon": False}
    axes.legend(**legend, labelcolor=colours["ink"], borderpad=0, columnspacing=1, handlelength=1.6)
    figure.savefig(file := io.BytesIO(), format="svg", transparent=True)
    return base64.b64encode(file.getvalue()).decode()


def by_picture(predictions):
    """[{image_path, file, questions}], each question with the filters that it stands under, in the file's order."""
    pictures = {}
    for each in predictions:
        picture = {"image_path": each["image_path"], "file": each["file"], "questions": []}
        picture = pictures.setdefault(each["file"], picture)
        picture["questions"].append({**each, "states": states(each)})
    return list(pictures.values())


def states(prediction):
    before, after = prediction["before_correct"], prediction["after_correct"]
    found = ["wrong"] if after is False else []
    if before is not None and before != after:
        found.append("newly-right" if after else "newly-wrong")
    return found


def choose(pictures):
    """The pictures for the page, with thumbnails, and those not shown: if there are too many, the uneventful ones."""
    by_interest = sorted(pictures, key=lambda picture: not any(each["states"] for each in picture["questions"]))
    chosen, unshown = by_interest[:MOST_PICTURES], by_interest[MOST_PICTURES:]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        thumbnails = pool.map(thumbnail, [picture["file"] for picture in chosen])
        return [{**picture, "thumbnail": each} for picture, each in zip(chosen, thumbnails, strict=True)], unshown


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
