"""What is in the data files, and what is wrong with them, before any time is spent on training."""

import io
import re
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from moondream2.scoring import baseline_accuracy, normalize

FIRST_SOURCES = 3  # that a warning or a reason for leaving lines out names
TOP_ANSWERS = 10
SMALLEST_VALIDATION = 20  # examples of a file that judges; below it one answer moves the accuracy by more than 5 points
LARGEST_SHARE = 0.9  # of one answer; above it a model that never looks at the picture scores as well
# Special tokens such as <|endoftext|>, a picture's placeholder, and the prompt's words around a question.
MARKER = re.compile(r"<\|[^|<>]{1,40}\|>|</?(?:image|img|s)>|\[/?INST\]|^Question:|Answer:$")
LOG_WIDTH = 100  # columns of the table where it goes into a file and no terminal says how wide it is


def summarize(train, valid, test=None) -> dict:
    """Facts about the datasets and warnings about them, as plain data that JSON can hold."""
    datasets = {"train": train, "valid": valid} | ({} if test is None else {"test": test})
    files = {name: summarize_file(dataset) for name, dataset in datasets.items()}
    baselines = {"baseline_accuracy": baseline_accuracy(train.examples, valid.examples)}
    if test is not None:
        baselines["test_baseline_accuracy"] = baseline_accuracy(train.examples, test.examples)
    return {
        **files,
        **baselines,
        "warnings": [
            *leaks(train, valid, "validation"),
            *(warning for other in (train, valid) if test for warning in leaks(other, test, "the test")),
            *(warning for dataset in datasets.values() for warning in repeats(dataset)),
            *(warning for dataset in datasets.values() for warning in contradictions(dataset)),
            *(warning for dataset in datasets.values() for warning in markers(dataset)),
            *(warning for dataset in datasets.values() for warning in missing(dataset)),
            *(warning for name, dataset in datasets.items() if name != "train" for warning in too_small(dataset)),
            *(warning for file in files.values() for warning in one_sided(file)),
            *remarked(*datasets.values()),
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
        "skipped": by_reason(dataset.skipped),
    }


def by_reason(lines):
    """{reason: {"count", "sources"}} of the (source, reason) of lines left out; details behind a colon don't count."""
    sources = defaultdict(list)
    for source, reason in lines:
        sources[reason.split(":")[0]].append(source)
    return {reason: {"count": len(each), "sources": each[:FIRST_SOURCES]} for reason, each in sources.items()}


def left_out_by_reason(skipped, left_out) -> list[dict]:
    """The lines that were not trained or validated on, as [{"when", "reason", "count", "sources"}].

    Args:
        skipped: (source, reason) of the lines left out as the files were read.
        left_out: (source, reason) of those whose picture disappeared or broke later.
    """
    stages = {"as the files were read": skipped, "during the run": left_out}
    return [
        {"when": when, "reason": reason, **each}
        for when, lines in stages.items()
        for reason, each in by_reason(lines).items()
    ]


def counted(lines):
    """How many lines, and the first few of them: "5 (train.jsonl:7, train.jsonl:8, train.jsonl:9, …)"."""
    more = ", …" if lines["count"] > len(lines["sources"]) else ""
    return f"{lines['count']:,} ({', '.join(lines['sources'])}{more})"


def median_and_most(numbers):
    numbers = list(numbers)
    return {"median": statistics.median_low(numbers), "most": max(numbers)}


def picture_sizes(sizes):
    """The [width, height] of the picture with the fewest pixels, the one in the middle, and the one with the most."""
    sizes = [list(size) for size in sorted(sizes, key=lambda size: (size[0] * size[1], size))]
    return {"smallest": sizes[0], "median": sizes[(len(sizes) - 1) // 2], "largest": sizes[-1]}


def leaks(known, judge, judgement):
    """Pictures of the file that judges which stand in one that the model is made by as well, whatever their names."""
    pictures = {example.picture for example in known.examples}
    shared = {}
    for example in judge.examples:
        if example.picture in pictures:
            shared.setdefault(example.picture, example.source)
    if shared:
        how_many = count(shared, "picture stands", "pictures stand")
        where = f"{known.path.name} and {judge.path.name} ({first(shared.values())})"
        yield f"{how_many} in both {where}: a leak makes {judgement} mean nothing"


def repeats(dataset):
    """Examples that say word for word what an earlier one says."""
    seen, again = set(), []
    for example in dataset.examples:
        words = (example.picture, example.question, example.answer)
        if words in seen:
            again.append(example.source)
        seen.add(words)
    if again:
        yield f"{count(again, 'example repeats', 'examples repeat')} an earlier one word for word ({first(again)})"


def contradictions(dataset):
    """Questions that are asked twice of a picture with answers that differ, none being right for both."""
    answers, sources = {}, {}
    for example in dataset.examples:
        asked = (example.picture, normalize(example.question))
        right = set(map(normalize, example.answers))
        if right.isdisjoint(answers.setdefault(asked, right)):
            sources.setdefault(asked, example.source)
    if sources:
        times = count(sources, "question is asked of its picture", "questions are asked of their picture")
        yield f"{times} more than once, with different answers ({first(sources.values())})"


def markers(dataset):
    """Words of a format, the model's own or another's, that stand in the texts; they would be learned as words."""
    sources, found = [], Counter()
    for example in dataset.examples:
        texts = example.question, *example.answers
        words = {match[0].strip() for text in texts for match in MARKER.finditer(text)}
        found.update(words)
        sources += [example.source] if words else []
    if sources:
        words = ", ".join(one_line(word, 30) for word, _ in found.most_common(FIRST_SOURCES))
        texts = count(sources, "example has", "examples have")
        yield f"{texts} words of a format in question or answer, taken as plain text: {words} ({first(sources)})"


def missing(dataset):
    """Lines whose picture is not there."""
    sources = [source for source, reason in dataset.skipped if reason.startswith("picture not found")]
    if sources:
        lines = count(sources, "line names a picture", "lines name a picture")
        yield f"{lines} that is not there, of {len(dataset.examples) + len(dataset.skipped):,} in {dataset.path.name}"


def too_small(dataset):
    examples = len(dataset.examples)
    if examples < SMALLEST_VALIDATION:
        how_many = count(dataset.examples, "example", "examples")
        yield f"{dataset.path.name} has only {how_many}: one answer moves the accuracy by {1 / examples:.0%}"


def one_sided(file):
    """One answer that almost every example of the file has."""
    if file["answers"][0][1] > LARGEST_SHARE * file["examples"]:
        answer, times = file["answers"][0]
        name = file["path"].replace("\\", "/").split("/")[-1]
        share = times / file["examples"]
        yield f'"{one_line(answer, 30)}" is {share:.0%} of the answers in {name}: there is little else to learn'


def remarked(*datasets):
    """What decoding told of pictures that are used all the same; nothing before they are decoded."""
    said, pictures = [], set()
    for dataset in datasets:
        for example in dataset.examples:
            if example.picture not in pictures:
                said += [(example.source, remark) for remark in dataset.remarks.get(example.picture, ())]
            pictures.add(example.picture)
    return [f"{remark}: {counted(lines)}" for remark, lines in by_reason(said).items()]


def count(things, one, many):
    return f"{len(things):,} {one if len(things) == 1 else many}"


def first(sources):
    """The first few sources, and that there are more."""
    sources = list(sources)
    return ", ".join(sources[:FIRST_SOURCES]) + (", …" if len(sources) > FIRST_SOURCES else "")


def printable(text):
    """Text from the data with spaces for what ends a line or moves a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(text, width):
    """Text from the data on one line of at most `width` columns of a terminal."""
    line = Text(" ".join(printable(text).split()))
    line.truncate(width, overflow="ellipsis")
    return line.plain


def format_table(summary: dict) -> str:
    """What the files say before any picture is decoded: one row a fact, one column a file, then notes on them."""
    files = [summary[name] for name in ("train", "valid", "test") if name in summary]
    rows = [(name, [f"{file[name]:,}" for file in files]) for name in ("examples", "pictures", "different_answers")]
    for name in ("questions_per_picture", "prompt_tokens", "answer_tokens"):
        rows.append((name, [f"{file[name]['median']}, at most {file[name]['most']}" for file in files]))
    rows.append(("picture_sizes", [smallest_to_largest(file["picture_sizes"]) for file in files]))
    most = min(3, max(len(file["answers"]) for file in files))
    rows += [("" if i else "most_frequent_answers", [top_answer(file, i) for file in files]) for i in range(most)]
    rows = [(name.replace("_", " "), cells) for name, cells in rows]
    for reason in dict.fromkeys(reason for file in files for reason in file["skipped"]):
        skipped = [file["skipped"].get(reason) for file in files]
        rows.append((f"skipped: {reason}", [counted(lines) if lines else "-" for lines in skipped]))

    table = Table(Column(no_wrap=True), box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    paths = [file["path"] for file in files]
    names = [Path(path).name for path in paths]
    for name in names if len(set(names)) > 1 else paths:
        table.add_column(cell(name))
    for name, cells in rows:
        table.add_row(cell(name), *map(cell, cells))
    on_test = f" ({summary['test_baseline_accuracy']:.1%} on the test)" if "test" in summary else ""
    baseline = f"{summary['baseline_accuracy']:.1%} accuracy{on_test}, by always giving"
    baseline += " a question's most frequent answer"
    return rendered(table, notes([("baseline", baseline), *(("warning", each) for each in summary["warnings"])]))


def format_left_out(left_out, warnings=()) -> str:
    """What only decoding the pictures told: how many lines are left out for it, and warnings; "" for nothing.

    Args:
        left_out: the lines' (source, reason).
        warnings: of `remarked`.
    """
    pairs = [("left out", f"{reason}: {counted(lines)}") for reason, lines in by_reason(left_out).items()]
    pairs += [("warning", each) for each in warnings]
    return rendered(notes(pairs)) if pairs else ""


def notes(pairs):
    """A grid of a kind of note and its text, which goes on below itself."""
    grid = Table.grid(Column(no_wrap=True), Column(), padding=(0, 2, 0, 0))
    for kind, text in pairs:
        grid.add_row(cell(f"{kind}:"), cell(text))
    return grid


def cell(text):
    """Text from the data as it stands: nothing in it is markup, and what is too long goes on in the next line."""
    return Text(printable(text), overflow="fold")


def rendered(*parts):
    """The parts as plain text, as wide as the terminal; LOG_WIDTH columns where there is none."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else LOG_WIDTH
    console = Console(file=io.StringIO(), width=width, force_terminal=False, force_jupyter=False)
    console.print(*parts)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def smallest_to_largest(sizes):
    smallest, largest = ("{} x {}".format(*sizes[which]) for which in ("smallest", "largest"))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def top_answer(file, i):
    if i >= len(file["answers"]):
        return ""
    answer, times = file["answers"][i]
    return f"{times / file['examples']:4.0%} {one_line(answer, 29)}"
