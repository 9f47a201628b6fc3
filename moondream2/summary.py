"""What is in the training and validation files, and what is wrong with them, before any time is spent on training."""

import statistics
import textwrap
import unicodedata
from collections import Counter, defaultdict

from moondream2.scoring import baseline_accuracy, normalize

FIRST_PLACES = 3  # that a warning or a reason for skipping names
TOP_ANSWERS = 10
SMALLEST_VALIDATION = 20  # examples; below it one answer moves the accuracy by more than 5 points
LARGEST_SHARE = 0.9  # of one answer; above it a model that never looks at the picture scores as well


def summarize(train, valid) -> dict:
    """Facts about both datasets and warnings about them, as plain data that JSON can hold."""
    files = {"train": summarize_file(train), "valid": summarize_file(valid)}
    can_score = train.examples and valid.examples
    return {
        **files,
        "baseline_accuracy": baseline_accuracy(train.examples, valid.examples) if can_score else None,
        "warnings": [
            *leaks(train, valid),
            *(warning for dataset in (train, valid) for warning in repeats(dataset)),
            *(warning for dataset in (train, valid) for warning in contradictions(dataset)),
            *too_small(valid),
            *(warning for file in files.values() for warning in one_sided(file)),
        ],
    }


def summarize_file(dataset):
    """The facts about one dataset: counts, tokens, answers, picture sizes, and what was skipped and why."""
    examples = dataset.examples
    questions = Counter(example.picture for example in examples)
    answers = Counter(normalize(example.answer) for example in examples)
    spelling = {}
    for example in examples:
        spelling.setdefault(normalize(example.answer), example.answer)
    skipped = defaultdict(list)
    for place, reason in dataset.skipped:
        skipped[reason.split(":")[0]].append(place)
    return {
        "path": str(dataset.path),
        "examples": len(examples),
        "pictures": len(questions),
        "questions_per_picture": median_and_most(questions.values()),
        "prompt_tokens": median_and_most(len(example.prompt_ids) for example in examples),
        "answer_tokens": median_and_most(len(example.answer_ids) for example in examples),
        "different_answers": len(answers),
        "answers": [[spelling[answer], count] for answer, count in answers.most_common(TOP_ANSWERS)],
        "picture_sizes": picture_sizes([dataset.pictures[picture].size for picture in questions]),
        "skipped": {
            reason: {"count": len(places), "places": places[:FIRST_PLACES]} for reason, places in skipped.items()
        },
    }


def median_and_most(numbers):
    numbers = list(numbers)
    return {"median": statistics.median_low(numbers), "most": max(numbers)} if numbers else None


def picture_sizes(sizes):
    """The [width, height] of the picture with the fewest pixels, the one in the middle, and the one with the most."""
    sizes = [list(size) for size in sorted(sizes, key=lambda size: (size[0] * size[1], size))]
    return {"smallest": sizes[0], "median": sizes[(len(sizes) - 1) // 2], "largest": sizes[-1]} if sizes else None


def leaks(train, valid):
    """Pictures that stand in both files, whatever their names are."""
    trained = {example.picture for example in train.examples}
    shared = {}
    for example in valid.examples:
        if example.picture in trained:
            shared.setdefault(example.picture, example.place)
    if shared:
        how_many = count(shared, "picture stands", "pictures stand")
        where = f"{train.path.name} and {valid.path.name} ({first(shared.values())})"
        yield f"{how_many} in both {where}: a leak makes validation mean nothing"


def repeats(dataset):
    """Examples that say word for word what an earlier one says."""
    seen, again = set(), []
    for example in dataset.examples:
        words = (example.picture, example.question, example.answer)
        if words in seen:
            again.append(example.place)
        seen.add(words)
    if again:
        yield f"{count(again, 'example repeats', 'examples repeat')} an earlier one word for word ({first(again)})"


def contradictions(dataset):
    """Questions that are asked twice of a picture with answers that differ."""
    answers, places = {}, {}
    for example in dataset.examples:
        asked = (example.picture, normalize(example.question))
        answer = answers.setdefault(asked, normalize(example.answer))
        if answer != normalize(example.answer):
            places.setdefault(asked, example.place)
    if places:
        times = count(places, "question is asked of its picture", "questions are asked of their picture")
        yield f"{times} more than once, with different answers ({first(places.values())})"


def too_small(valid):
    examples = len(valid.examples)
    if 0 < examples < SMALLEST_VALIDATION:
        how_many = count(valid.examples, "example", "examples")
        yield f"{valid.path.name} has only {how_many}: one answer moves the accuracy by {1 / examples:.0%}"


def one_sided(file):
    """One answer that almost every example of the file has."""
    if file["examples"] and file["answers"][0][1] > LARGEST_SHARE * file["examples"]:
        answer, times = file["answers"][0]
        name = file["path"].replace("\\", "/").split("/")[-1]
        share = times / file["examples"]
        yield f'"{one_line(answer, 30)}" is {share:.0%} of the answers in {name}: there is little else to learn'


def count(things, one, many):
    return f"{len(things):,} {one if len(things) == 1 else many}"


def first(places):
    """The first few places, and that there are more."""
    places = list(places)
    return ", ".join(places[:FIRST_PLACES]) + (", …" if len(places) > FIRST_PLACES else "")


def printable(text):
    """Text from the data with spaces for what ends a line or moves a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(text, width):
    """Text from the data on one line of at most `width` characters."""
    text = " ".join(printable(text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def format_table(summary: dict) -> str:
    """The summary for a terminal: one row a fact, one column a file, then the baseline and the warnings."""
    files = [summary["train"], summary["valid"]]
    rows = [["", *(file["path"][-34:] for file in files)]]
    for name in ("examples", "pictures", "different_answers"):
        rows.append([name, *(f"{file[name]:,}" for file in files)])
    for name in ("questions_per_picture", "prompt_tokens", "answer_tokens"):
        rows.append([name, *(spread(file[name]) for file in files)])
    rows.append(["picture_sizes", *(smallest_to_largest(file["picture_sizes"]) for file in files)])
    rows += [["" if i else "most_frequent_answers", *(top_answer(file, i) for file in files)] for i in range(3)]
    for reason in sorted({reason for file in files for reason in file["skipped"]}):
        rows.append([f"skipped: {reason}", *(skips(file["skipped"].get(reason)) for file in files)])
    lines = ["  ".join(map(cell, (row[0].replace("_", " "), *row[1:]), (28, 34, 34))).rstrip() for row in rows]
    if summary["baseline_accuracy"] is not None:
        baseline = f"{summary['baseline_accuracy']:.1%}, by always giving a question's most frequent answer"
        lines.append(f"{cell('baseline accuracy', 28)}  {baseline}")
    for warning in summary["warnings"]:
        lines += textwrap.wrap(f"warning: {printable(warning)}", 100, subsequent_indent=" " * 9)
    return "\n".join(lines)


def spread(numbers):
    return f"{numbers['median']}, at most {numbers['most']}" if numbers else "-"


def smallest_to_largest(sizes):
    smallest, largest = ("{} x {}".format(*sizes[which]) if sizes else "-" for which in ("smallest", "largest"))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def top_answer(file, i):
    if i >= len(file["answers"]):
        return ""
    answer, times = file["answers"][i]
    return f"{times / file['examples']:4.0%} {one_line(answer, 29)}"


def skips(skipped):
    return f"{skipped['count']:,} ({first(skipped['places'])})" if skipped else "-"


def cell(text, width):
    """Text in exactly `width` columns of a terminal, where a Chinese or Japanese character takes two."""
    text = printable(text)
    columns = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]
    while sum(columns) > width:
        text, columns = text[:-1], columns[:-1]
    return text + " " * (width - sum(columns))
