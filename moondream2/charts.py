"""The charts of a report: SVGs in the page's colours for light and dark, each with words that say what it shows."""

import base64
import io
import re

from moondream2.verdict import BINS, TRUSTED, reliability, selective

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
IN_PERCENT = "{x:.0%}"  # of an axis, as matplotlib takes it
CURVES = {  # of a number in the history: its name, its colour, its style
    "train_loss": ("training", "second", "s--"),
    "valid_loss": ("validation", "first", "o-"),
    "valid_accuracy": ("validation", "first", "o-"),
}


def percent(fraction):
    return "–" if fraction is None else f"{fraction:.1%}"


def decimals(number):
    return "–" if number is None else f"{number:.4f}"


def of_epochs(run):
    """The curves of loss and, where it was measured, of accuracy, both of the validation set."""
    baseline = run["data"] and run["data"]["baseline_accuracy"]
    yield by_epoch("Loss by epoch", run, ["train_loss", "valid_loss"])
    if any(record.get("valid_accuracy") is not None for record in run["history"]):
        yield by_epoch("Accuracy by epoch", run, ["valid_accuracy"], baseline)


def by_epoch(title, run, names, baseline=None):
    """A chart of the numbers of these names."""
    parts = [*(in_words(run["history"], name) for name in names)]
    parts += [] if baseline is None else [f"baseline: {percent(baseline)}"]
    parts += [] if run["kept_epoch"] is None else [f"kept: epoch {run['kept_epoch']}"]
    return chart(title, parts, draw_epochs, run, names, baseline)


def of_trust(predictions):
    """Whether an answer's probability tells if it is right, and what leaving the least sure unanswered is worth."""
    found, points = reliability(predictions), selective(predictions)
    if found is None:
        return
    bins = [
        f"{i / BINS:.0%} to {(i + 1) / BINS:.0%} sure: {each['count']:,} answers, {each['accuracy']:.0%} right"
        for i, each in enumerate(found["bins"])
        if each["count"]
    ]
    yield chart(
        "Right by probability", [f"Expected calibration error: {percent(found['error'])}", *bins], draw_bins, found
    )
    shares = [next(point for point in points if point[0] >= share - 1e-9) for share in (0.25, 0.5, 0.75, 1)]
    parts = [f"{share:.0%} answered: {accuracy:.0%} right" for share, accuracy in dict.fromkeys(shares)]
    yield chart("Right when the least sure are left unanswered", parts, draw_selective, points)


def chart(title, parts, draw, *arguments):
    """{title, alt: what it says, light and dark: an SVG in base64}, drawn by `draw(axes, colours, *arguments)`."""
    from matplotlib.figure import Figure  # a fifth of all that a run imports, of which its end alone has need

    colours = PALETTE["light"]
    figure = Figure(figsize=(4.3, 2.7), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, colours, *arguments)
    axes.grid(axis="y", color=colours["line"])
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["muted"], length=0)
    axes.spines[:].set_visible(False)
    legend = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "frameon": False}
    axes.legend(**legend, labelcolor=colours["ink"], borderpad=0, columnspacing=1, handlelength=1.6)
    figure.savefig(file := io.StringIO(), format="svg", transparent=True)
    # Drawing takes most of a page's time, so it is done once: for dark the same lines are given other colours.
    darker = {colour: PALETTE["dark"][name] for name, colour in colours.items()}
    drawn = {"light": file.getvalue()}
    drawn["dark"] = re.sub("#[0-9a-f]{6}", lambda found: darker.get(found[0], found[0]), drawn["light"])
    pictures = {scheme: base64.b64encode(svg.encode()).decode() for scheme, svg in drawn.items()}
    return {"title": title, "alt": ". ".join([title, *parts]) + ".", **pictures}


def in_words(history, name):
    """What a curve says: its first, best and last number."""
    known = [(record["epoch"], record[name]) for record in history if record.get(name) is not None]
    if not known:
        return f"{CURVES[name][0]}: no numbers"
    form, better = (percent, max) if name == "valid_accuracy" else (decimals, min)
    points = {"first": known[0], "best": better(known, key=lambda point: point[1]), "last": known[-1]}
    told = [f"{which} {form(value)} (epoch {epoch})" for which, (epoch, value) in points.items()]
    return f"{CURVES[name][0]}: {', '.join(told)}"


def draw_epochs(axes, colours, run, names, baseline):
    """Lines over the epochs; a number that is missing leaves a gap."""
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
    axes.locator_params("x", integer=True)
    if "valid_accuracy" in names:
        axes.yaxis.set_major_formatter(IN_PERCENT)


def draw_bins(axes, colours, found):
    """A bar for each range of probability, as high as the share of right answers, with how many answers it has."""
    shown = [(i, each) for i, each in enumerate(found["bins"]) if each["count"]]
    middles, heights = [(i + 0.5) / BINS for i, _ in shown], [each["accuracy"] for _, each in shown]
    axes.bar(middles, heights, 0.86 / BINS, color=colours["first"], label="right")
    axes.plot([0, 1], [0, 1], "--", color=colours["second"], label="as often as it is sure")
    for middle, height, (_, each) in zip(middles, heights, shown, strict=True):
        text = {"ha": "center", "va": "bottom", "fontsize": 8, "color": colours["ink"]}
        axes.text(middle, height + 0.01, f"{each['count']:,}", **text)
    axes.set(xlim=(0, 1), ylim=(0, 1.1))
    in_percent(axes, colours, "probability of the answer")


def draw_selective(axes, colours, points):
    shares, accuracies = zip(*points, strict=True)
    axes.plot(
        shares, accuracies, "o-" if len(points) < 20 else "-", color=colours["first"], markersize=4, label="right"
    )
    axes.axhline(TRUSTED, color=colours["muted"], linestyle=":", label=f"{TRUSTED:.0%}")
    axes.set(xlim=(0, 1.02), ylim=(min(0.5, *accuracies) - 0.02, 1.02))
    in_percent(axes, colours, "questions answered, the surest first")


def in_percent(axes, colours, label):
    axes.set_xlabel(label, color=colours["muted"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(IN_PERCENT)
