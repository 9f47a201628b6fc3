"""The report of a run: one HTML file with nothing to fetch that shows what the model answers and if training helped."""

import base64
import io
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moondream2.files import write_text
from moondream2.modeling_moondream2 import upright_rgb
from moondream2.pictures import PictureError, open_picture

MOST_PICTURES = 300  # on the page; some 6 MB
THUMBNAIL = (320, 240)  # pixels at most, width and height

# matplotlib is given colours that stand for the page's own, which differ in light and dark
INK, MUTED, LINE, FIRST, SECOND = "#000001", "#000002", "#000003", "#000004", "#000005"
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", FIRST: "--first", SECOND: "--second"}


def write_report(path: Path, run: dict) -> None:
    """Writes the report of a run, or of scoring a saved model, whole or not at all.

    Args:
        path: of the HTML file.
        run: plain data: title, model, history, kept_epoch, data, predictions, constants, machine. Without training, the
            history has one entry at most and each prediction's "before" is None.
    Raises:
        InputError: the file can't be written.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.filters |= {"percent": percent, "decimals": decimals, "duration": duration}
    scores = scores_of(run)
    pictures, left_out = choose(by_picture(run["predictions"]))
    page = templates.get_template("report.html.jinja").render(
        run=run,
        scores=scores,
        verdict=verdict(scores),
        warnings=list(warnings(scores)),
        charts=list(charts(run, scores["baseline"])) if scores["is_trained"] else [],
        pictures=pictures,
        left_out=left_out,
        nonce=secrets.token_urlsafe(16),
    )
    write_text(Path(path), page.encode("utf-8", "replace").decode("utf-8"))  # a path may hold half a character


def percent(share):
    return "–" if share is None else f"{share:.1%}"


def decimals(number):
    return "–" if number is None else f"{number:.4f}"


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def scores_of(run):
    """What a verdict rests on: accuracy and loss before training and of the kept epoch, and the baseline."""
    history, predictions = run["history"], run["predictions"]
    epochs = {record["epoch"]: record for record in history}
    first, last = epochs.get(0, {}) if any(epochs) else {}, history[-1] if history else {}
    kept = epochs.get(run["kept_epoch"], last)
    before, after = first.get("valid_accuracy"), kept.get("valid_accuracy")
    return {
        "is_trained": any(epochs),
        "kept": kept,
        "last": last,
        "before": share(each["before_correct"] for each in predictions) if before is None else before,
        "after": share(each["after_correct"] for each in predictions) if after is None else after,
        "loss_before": first.get("valid_loss"),
        "loss_after": kept.get("valid_loss"),
        "baseline": run["data"]["baseline_accuracy"] if run["data"] else None,
    }


def share(answers):
    """How many of the answers that were marked are right, 0.0 to 1.0; None where none was marked."""
    marked = [is_right for is_right in answers if is_right is not None]
    return sum(marked) / len(marked) if marked else None


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


def warnings(scores):
    """Sentences on what a person should know before trusting the model."""
    before, after, baseline = scores["before"], scores["after"], scores["baseline"]
    if None not in (after, baseline) and after <= baseline:
        who = "Training did not beat" if scores["is_trained"] else "The model does not beat"
        yield f"{who} the baseline: giving each question its most frequent answer scores {percent(baseline)}."
    if None not in (before, after) and after < before:
        yield f"Accuracy fell from {percent(before)} to {percent(after)}: the model answered better before training."
    kept, last = scores["kept"], scores["last"]
    if None not in (kept.get("train_loss"), last.get("train_loss")):
        valid, train = [(kept[name], last[name]) for name in ("valid_loss", "train_loss")]
        if valid[0] < valid[1] and train[0] > train[1]:
            yield (
                f"It overfits after epoch {kept['epoch']}: by the last epoch, validation loss rose from "
                f"{valid[0]:.4f} to {valid[1]:.4f} while training loss fell from {train[0]:.4f} to {train[1]:.4f}."
            )


def charts(run, baseline):
    """The curves of loss and, where it was measured, of accuracy."""
    losses = [("training", "train_loss", SECOND, "s--"), ("validation", "valid_loss", FIRST, "o-")]
    yield chart("Loss by epoch", run, losses)
    if any(record.get("valid_accuracy") is not None for record in run["history"]):
        accuracy = [("validation", "valid_accuracy", FIRST, "o-")]
        yield chart("Accuracy by epoch", run, accuracy, baseline, PercentFormatter(1, 0))


def chart(title, run, lines, baseline=None, formatter=None):
    """A line chart as {title, view, body} of an inline SVG in the page's colours."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.color": INK}):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for label, name, colour, style in lines:
            known = [record for record in run["history"] if record.get(name) is not None]
            epochs, values = ([record[key] for record in known] for key in ("epoch", name))
            axes.plot(epochs, values, style, color=colour, markersize=5, label=label)
        if baseline is not None:
            axes.axhline(baseline, color=MUTED, linestyle=":", label="baseline")
        if run["kept_epoch"] is not None:
            label = f"kept: epoch {run['kept_epoch']}"
            axes.axvline(run["kept_epoch"], color=MUTED, linewidth=6, alpha=0.25, label=label)
        axes.set_xlabel("epoch", color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if formatter:
            axes.yaxis.set_major_formatter(formatter)
        axes.grid(axis="y", color=LINE)
        axes.tick_params(colors=MUTED, length=0)
        axes.spines[:].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderpad=0, columnspacing=1.4)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{title.split()[0]}-", file.getvalue())  # two charts stand in one page
    svg = re.sub(r"font-family: [^;]*;", "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    view, body = re.search(r'viewBox="([^"]*)".*?</metadata>(.*)</svg>', svg, re.DOTALL).groups()
    return {"title": title, "view": view, "body": Markup(body)}


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
    found = [] if after else ["wrong"]
    if before is not None and before != after:
        found.append("newly-right" if after else "newly-wrong")
    return found


def choose(pictures):
    """The pictures for the page, with thumbnails, and those left out: if there are too many, the uneventful ones."""
    by_interest = sorted(pictures, key=lambda picture: not any(each["states"] for each in picture["questions"]))
    chosen, left_out = by_interest[:MOST_PICTURES], by_interest[MOST_PICTURES:]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        thumbnails = pool.map(thumbnail, [picture["file"] for picture in chosen])
        return [{**picture, "thumbnail": each} for picture, each in zip(chosen, thumbnails, strict=True)], left_out


def thumbnail(file):
    """A picture as a small JPEG in base64, upright; None where the file is gone or broken by now."""

    def shrink(image):
        image.draft(None, [2 * side for side in THUMBNAIL])  # decodes a large JPEG at a fraction of its size
        image = upright_rgb(image)
        image.thumbnail(THUMBNAIL)
        image.save(small := io.BytesIO(), "JPEG", quality=80)
        return base64.b64encode(small.getvalue()).decode()

    try:
        return open_picture(Path(file), shrink)[0]
    except PictureError:
        return None
