"""What the answers of a run mean: how sure its figures are, what kind of mistakes it makes, how sure its answers are.

All of it comes from a list of predictions, the dictionaries of `report.predictions`.
"""

import math
from collections import Counter, defaultdict
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from moondream2.scoring import most_frequent, normalize
from moondream2.summary import one_line

DRAWS = 10_000  # of the bootstrap
LEVEL = 0.95
LEAST_PICTURES = 5  # that an interval needs: fewer can be drawn in too few ways
LEAST_ASKED = 5  # times that a question is asked to be looked at on its own
FEW = 10  # examples; a figure that rests on fewer says so
MOST_ANSWERS = 8  # different right ones that a question may have to get a table
BINS = 10  # of the reliability curve, equally wide
TRUSTED = 0.95  # the share of right answers that a threshold is looked for
THRESHOLDS = [None, *(step / 20 for step in range(1, 20)), 0.99]  # of an answer's probability; None: all are answered


# ---------------------------------------------------------------------------------------------------------------------
# How sure is the figure
# ---------------------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean, and the ends of its 95% interval, which are None where there are too few pictures for one."""

    value: float
    low: float | None
    high: float | None
    questions: int
    pictures: int


def estimate(values, pictures, least=0.0) -> Estimate | None:
    """The mean of one value a question, with an interval by a bootstrap over pictures; None of no values.

    The questions of a picture hang together, so it is pictures that are drawn, with all their questions: 10,000 times
    as many as there are, always the same draws. The interval is the expanded percentile interval (Hesterberg 2015,
    https://doi.org/10.1080/00031305.2015.1089789), which is wider than the plain one where pictures are few. Where the
    questions of each picture have the same mean, a draw says nothing. Then it is the rule of three (Hanley and
    Lippman-Hand 1983, https://doi.org/10.1001/jama.1983.03330370053031), with a picture as a trial: of all pictures a
    share of 1 - 0.05^(1/n), about 3/n, may be quite different from the n that were seen.

    Args:
        values: numbers from `least` to 1.
        pictures: of each value, what it belongs to.
    """
    if not len(values):
        return None
    _, picture = np.unique(pictures, return_inverse=True)
    sums, counts = np.bincount(picture, np.asarray(values, float)), np.bincount(picture)
    n, mean = len(counts), sums.sum() / counts.sum()
    if n < LEAST_PICTURES:
        low = high = None
    elif np.allclose(sums, mean * counts):
        alike = (1 - LEVEL) ** (1 / n)
        low, high = (float(alike * mean + (1 - alike) * end) for end in (least, 1))
    else:
        low, high = np.quantile(draw_means(sums, counts), expanded_tails(n)).tolist()
    return Estimate(float(mean), low, high, len(values), n)


def draw_means(sums, counts):
    """The means (DRAWS,) of draws of as many pictures as there are, which have these sums over so many questions.

    How often each kind of picture is drawn follows a multinomial distribution, and there are few kinds: with so many
    right of so many.
    """
    kinds, pictures = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(counts), pictures / len(counts), DRAWS)
    total, questions = (drawn @ kinds).T
    return total / questions


def expanded_tails(n):
    """The quantiles of a bootstrap's means between which the expanded percentile interval lies."""
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile((1 + LEVEL) / 2, n - 1))
    return [tail, 1 - tail]


def t_quantile(p, degrees):
    """Student's t distribution's, within 0.01 from four degrees of freedom on (Abramowitz and Stegun 1964, 26.7.5)."""
    x = NormalDist().inv_cdf(p)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def accuracy_of(predictions, when="after") -> Estimate | None:
    """The accuracy of the answers before or after training; None where nothing was scored."""
    scored = [each for each in predictions if each[f"{when}_correct"] is not None]
    return estimate([each[f"{when}_correct"] for each in scored], [each["file"] for each in scored])


def gain_of(predictions) -> Estimate | None:
    """Accuracy after less before training, of the questions that were answered both times: the draws are paired."""
    pairs = [each for each in predictions if None not in (each["before_correct"], each["after_correct"])]
    changes = [each["after_correct"] - each["before_correct"] for each in pairs]
    return estimate(changes, [each["file"] for each in pairs], least=-1.0)


def verdict(predictions, names=None) -> str | None:
    """What came of it, in a sentence without its full stop; None where nothing was scored.

    A change is told as one where its interval, as it is shown, leaves out 0.

    Args:
        names: {"before", "after"} of two models that are compared; else the model was trained in between.
    """
    gain = gain_of(predictions)
    if gain is None:
        accuracy = accuracy_of(predictions)
        return accuracy and f"Accuracy is {with_interval(accuracy)}, of {asked(accuracy)}"
    rose = gain.value >= 0
    if not rose:
        gain = gain._replace(value=-gain.value, low=opposite(gain.high), high=opposite(gain.low))
    change, low, high = in_points(gain)
    size = f"{change} {'point' if change == '1' else 'points'}"
    if names:
        better, worse = (names["after"], names["before"]) if rose else (names["before"], names["after"])
        claim, doubt = f"{better} is right more often than {worse}, by {size}", f"the lead of {better}, {size},"
    else:
        claim = f"Training {'raised' if rose else 'lowered'} accuracy by {size}"
        doubt = f"the {'gain' if rose else 'loss'} of {size}"
    if not float(change):
        claim = f"No change in {asked(gain)}"
    elif low is None:
        claim = f"It takes more than {asked(gain)} to tell {doubt} from chance"
    elif not float(low) > 0:
        claim = f"{asked(gain)} can't tell {doubt} from chance"
    return claim if low is None else f"{claim} (95% interval {low} to {high})"


def with_interval(estimate):
    """An accuracy in percent with its interval: "68% (95% interval 60 to 76%)"."""
    value, low, high = in_points(estimate)
    return f"{value}% ({'too few pictures for an interval' if low is None else f'95% interval {low} to {high}%'})"


def in_points(estimate):
    """Value and ends as texts in points of a hundred, with a decimal where the interval is narrower than five."""
    digits = 1 if estimate.low is not None and estimate.high - estimate.low < 0.05 else 0
    ends = estimate.value, estimate.low, estimate.high
    return [None if end is None else f"{round(100 * end, digits) + 0.0:.{digits}f}" for end in ends]  # never -0


def opposite(number):
    return None if number is None else -number


def asked(estimate):
    return f"{counted(estimate.questions, 'question')} on {counted(estimate.pictures, 'picture')}"


def counted(number, what):
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------------------------
# What kind of mistake
# ---------------------------------------------------------------------------------------------------------------------


def by_question(predictions) -> list[dict]:
    """What came of each question that is asked a few times, those with the most wrong answers first.

    Returns:
        [{"question", "right": how many, "accuracy": Estimate, "few": whether it has few examples, "answers": how many
        different ones are right, "table": of `table`, or None}].
    """
    groups = defaultdict(list)
    for each in predictions:
        if each["after_correct"] is not None:
            groups[normalize(each["question"])].append(each)
    found = [
        {
            "question": group[0]["question"],
            "right": sum(each["after_correct"] for each in group),
            "accuracy": accuracy_of(group),
            "few": len(group) < FEW,
            "answers": len({normalize(true_and_said(each)[0]) for each in group}),
            "table": table(group),
        }
        for group in groups.values()
        if len(group) >= LEAST_ASKED
    ]
    return sorted(found, key=lambda each: each["right"] - each["accuracy"].questions)


def table(predictions) -> dict | None:
    """What was true of a question against what was said; None unless a handful of different answers are true.

    Of several right answers the one that was given counts as true, else the first, which is the most frequent one.

    Returns:
        {"answers": the different true ones, the most frequent first;
        "rows": [{"answer", "asked", "said": how often the answer was said, whatever was true, "counts": how often each
        of `answers` was said where this one was true and, last, anything else, "recall", "precision": None where it
        was never said, "few": whether it was true of few}];
        "mistakes": of `as_mistake`, the most frequent first}.
    """
    groups, spellings = defaultdict(list), defaultdict(list)
    for each in predictions:
        true, said = true_and_said(each)
        groups[normalize(true), normalize(said)].append(each)
        spellings[normalize(true)].append(true)
    answers = sorted(spellings, key=lambda answer: -len(spellings[answer]))
    if not 2 <= len(answers) <= MOST_ANSWERS:
        return None
    names = {answer: most_frequent(spellings[answer]) for answer in answers}
    cells = defaultdict(list)
    for (true, said), group in groups.items():
        cells[true, said if said in names else None] += group
    rows, mistakes = [], []
    for true in answers:
        counts, times = [len(cells[true, said]) for said in (*answers, None)], len(spellings[true])
        said, right = sum(len(cells[other, true]) for other in answers), len(cells[true, true])
        precision = right / said if said else None
        row = {"answer": names[true], "asked": times, "said": said, "counts": counts, "few": times < FEW}
        rows.append({**row, "recall": right / times, "precision": precision})
        wrong = [cells[true, said] for said in (*answers, None) if said != true and cells[true, said]]
        mistakes += [as_mistake(each, names[true], times) for each in wrong]
    return {"answers": list(names.values()), "rows": rows, "mistakes": in_order(mistakes)}


def true_and_said(prediction):
    """The answer that was matched, else the first; and what was said."""
    said = prediction["after"]
    matched = (answer for answer in prediction["answers"] if normalize(answer) == normalize(said))
    return next(matched, prediction["answers"][0]), said


def as_mistake(predictions, true, of):
    """What is to be told of a wrong cell.

    Returns:
        {"question", "true", "said": what mostly was, "is_one": whether it always was, "times", "of": how often `true`
        was, "surest": the highest probability of them, "predictions"}.
    """
    said = [each["after"] for each in predictions]
    return {
        "question": predictions[0]["question"],
        "true": true,
        "said": most_frequent(said),
        "is_one": len(set(map(normalize, said))) == 1,
        "times": len(said),
        "of": of,
        "surest": max(each["after_probability"] for each in predictions),
        "predictions": predictions,
    }


def in_order(mistakes):
    """The most frequent first; of two as frequent, the one that takes the larger part of its answer."""
    return sorted(mistakes, key=lambda each: (-each["times"], each["of"]))


def mistakes_of(questions) -> list[dict]:
    """Those of all tables that `by_question` has made."""
    return in_order([mistake for each in questions if each["table"] for mistake in each["table"]["mistakes"]])


def mistake_in_words(mistake) -> str:
    """'"Is it safe?": said "Yes" for "No" 7 times of 41', each text on one line."""
    question, true, said = (f'"{one_line(mistake[name], 60)}"' for name in ("question", "true", "said"))
    said = said if mistake["said"] else "nothing"
    said = said if mistake["is_one"] else f"something else ({said}, …)"
    return f"{question}: said {said} for {true} {times_of(mistake)}"


def times_of(mistake):
    times = "once" if mistake["times"] == 1 else f"{mistake['times']:,} times"
    return f"{times} of {mistake['of']:,}"


# ---------------------------------------------------------------------------------------------------------------------
# How sure is an answer
# ---------------------------------------------------------------------------------------------------------------------


def reliability(predictions) -> dict | None:
    """How far an answer's probability tells whether it is right; None where nothing was scored.

    Returns:
        {"bins": [{"count", "probability", "accuracy"}] of ten equally wide ranges of probability, both means, None in
        an empty one; "error": the expected calibration error, the mean distance of the two over all answers (Guo et
        al. 2017, https://arxiv.org/abs/1706.04599); "probability", "accuracy": the means of all; "cut": how many of the
        answers were cut, whose probability is that of what there is}.
    """
    scored = scored_of(predictions)
    if not scored:
        return None
    sure, right = (np.array([float(each[name]) for each in scored]) for name in ("after_probability", "after_correct"))
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    counts, sums, hits = (np.bincount(place, weights, BINS) for weights in (None, sure, right))
    bins = [
        {"count": int(n), "probability": float(s / n) if n else None, "accuracy": float(h / n) if n else None}
        for n, s, h in zip(counts, sums, hits, strict=True)
    ]
    return {
        "bins": bins,
        "error": float(np.abs(sums - hits).sum() / len(scored)),
        "probability": float(sure.mean()),
        "accuracy": float(right.mean()),
        "cut": sum(each["after_cut"] for each in scored),
    }


def sureness(probability) -> str:
    """A probability in percent, which is never told to be none or all."""
    return "over 99%" if probability >= 0.995 else "under 1%" if probability < 0.005 else f"{probability:.0%}"


def scored_of(predictions):
    """The predictions that were scored, the surest first."""
    scored = [each for each in predictions if each["after_correct"] is not None]
    return sorted(scored, key=lambda each: -each["after_probability"])


def selective(predictions) -> list[tuple[float, float]]:
    """(share of the questions that are answered, accuracy of these answers) when the least sure are left unanswered.

    Answers that are equally sure are answered together. Known as the risk-coverage curve (El-Yaniv and Wiener 2010,
    https://jmlr.org/papers/v11/el-yaniv10a.html), accuracy being 1 less the risk.
    """
    scored, points, right = scored_of(predictions), [], 0
    for number, each in enumerate(scored, start=1):
        right += each["after_correct"]
        if number == len(scored) or each["after_probability"] > scored[number]["after_probability"]:
            points.append((number / len(scored), right / number))
    return points


def threshold(predictions) -> tuple[float | None, Estimate] | None:
    """The probability above which answers can be trusted, None for all of them, and the accuracy of those above it.

    It is the lowest of THRESHOLDS above which at least 95% of the answers are right; where there is none, the one above
    which the largest share is. It leaves at least FEW answers; None where there are fewer.
    """
    scored, found = scored_of(predictions), []
    for least in THRESHOLDS:
        above = [each for each in scored if least is None or each["after_probability"] > least]
        if len(above) >= FEW:
            found.append((least, sum(each["after_correct"] for each in above) / len(above), above))
    if not found:
        return None
    best = max(share for _, share, _ in found)
    least, _, above = next(each for each in found if each[1] >= min(TRUSTED, best))
    return least, accuracy_of(above)


def trust_in_words(predictions) -> str | None:
    """What `threshold` found, in a sentence without its full stop."""
    found = threshold(predictions)
    if found is None:
        return None
    least, accuracy = found
    share = accuracy.questions / len(scored_of(predictions))
    told = "of all its answers" if least is None else f"above {least:.2f} it answers {share:.0%} of the questions, and"
    told = f"{told} {with_interval(accuracy)} {'of those ' if least is not None else ''}are right"
    if accuracy.value < TRUSTED:
        return f"No probability makes {TRUSTED:.0%} of the answers right: {told}"
    return told[0].upper() + told[1:]


def difference_in_words(predictions, names) -> str:
    """How many questions two models answer differently, and how many of these only one gets right."""
    differ = [each for each in predictions if each["before"] is not None and is_changed(each)]
    only = Counter(each["after_correct"] for each in differ if each["after_correct"] != each["before_correct"])
    told = f"{len(differ):,} of {counted(len(predictions), 'question')} are answered differently"
    return f"{told}: {only[True]:,} right only by {names['after']}, {only[False]:,} only by {names['before']}"


def is_changed(prediction):
    """Whether the two answers are different ones."""
    return normalize(prediction["before"]) != normalize(prediction["after"])


def sentences(predictions, names=None) -> list[str]:
    """The verdict, the largest mistake, and how far an answer can be trusted, as far as there is something to say.

    Args:
        names: {"before", "after"} of two models that are compared; the mistakes and the trust are the second's.
    """
    mistakes, whose = mistakes_of(by_question(predictions)), f" of {names['after']}" if names else ""
    largest = f"Largest mistake{whose}: {mistake_in_words(mistakes[0])}" if mistakes else None
    differing = difference_in_words(predictions, names) if names else None
    trusted = trust_in_words(predictions)
    if trusted and names:
        trusted = f"{names['after']}: {trusted[0].lower()}{trusted[1:]}"
    return [told for told in (verdict(predictions, names), differing, largest, trusted) if told]
