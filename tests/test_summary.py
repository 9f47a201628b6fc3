"""The facts about the data, the warnings, and the table in the terminal."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moondream2.summary import cell, format_table, summarize


def dataset(name, lines, sizes=None, skipped=()):
    """A dataset of (picture, question, answer) lines; prompts have a token a word, answers one more."""
    examples = [
        SimpleNamespace(
            picture=picture,
            question=question,
            answer=answer,
            place=f"{name}:{number}",
            prompt_ids=question.split(),
            answer_ids=[*answer.split(), "<end>"],
        )
        for number, (picture, question, answer) in enumerate(lines, start=1)
    ]
    pictures = {picture: SimpleNamespace(size=(sizes or {}).get(picture, (640, 480))) for picture, *_ in lines}
    return SimpleNamespace(path=Path(name), examples=examples, pictures=pictures, skipped=list(skipped))


def plenty(letter, lines=40):
    """Unobtrusive lines, of which nothing has to be warned."""
    return [(f"{letter}{i // 2}", f"Question {i % 2}?", f"answer {i % 10}") for i in range(lines)]


def warnings(train=None, valid=None):
    train, valid = dataset("train.jsonl", train or plenty("t")), dataset("valid.jsonl", valid or plenty("v"))
    return summarize(train, valid)["warnings"]


TRAIN = dataset(
    "train.jsonl",
    [
        ("a", "Is it safe to cross?", "Yes."),
        ("a", "How many cars?", "two"),
        ("a", "Is it raining?", "yes"),
        ("b", "Is it safe to cross?", "No, wait."),
        ("c", "Is it safe to cross?", "Yes."),
    ],
    sizes={"a": (100, 50), "b": (4000, 3000), "c": (60, 60)},
    skipped=[(f"train.jsonl:{i}", f"picture not found: images/{i}.jpg") for i in range(6, 11)]
    + [("train.jsonl:11", "picture broken: images/11.jpg: OSError: truncated")],
)


def test_facts_of_a_file():
    facts = summarize(TRAIN, dataset("valid.jsonl", plenty("v")))["train"]
    assert facts == {
        "path": "train.jsonl",
        "examples": 5,
        "pictures": 3,
        "questions_per_picture": {"median": 1, "most": 3},
        "prompt_tokens": {"median": 5, "most": 5},
        "answer_tokens": {"median": 2, "most": 3},
        "different_answers": 3,
        "answers": [["Yes.", 3], ["two", 1], ["No, wait.", 1]],
        "picture_sizes": {"smallest": [60, 60], "median": [100, 50], "largest": [4000, 3000]},
        "skipped": {
            "picture not found": {"count": 5, "places": ["train.jsonl:6", "train.jsonl:7", "train.jsonl:8"]},
            "picture broken": {"count": 1, "places": ["train.jsonl:11"]},
        },
    }


def test_ten_answers_at_most():
    facts = summarize(dataset("t", [("a", f"Question {i}?", f"answer {i}") for i in range(30)]), TRAIN)["train"]
    assert (facts["different_answers"], len(facts["answers"])) == (30, 10)


def test_summary_is_plain_data():
    summary = summarize(TRAIN, dataset("valid.jsonl", plenty("v")))
    assert json.loads(json.dumps(summary)) == summary


def test_baseline():
    valid = dataset("valid.jsonl", [("v", "Is it safe to cross?", "yes"), ("v", "How many cars?", "3")])
    assert summarize(TRAIN, valid)["baseline_accuracy"] == 0.5


def test_a_file_without_examples():
    summary = summarize(dataset("train.jsonl", []), dataset("valid.jsonl", plenty("v")))
    assert summary["baseline_accuracy"] is None
    assert summary["train"]["picture_sizes"] is None
    assert "baseline" not in format_table(summary)


def test_no_warning_without_a_reason():
    assert warnings() == []


def test_warning_of_a_leak_goes_by_content():
    assert warnings(valid=[("t3", "Another question?", "other"), *plenty("v")]) == [
        "1 picture stands in both train.jsonl and valid.jsonl (valid.jsonl:1): a leak makes validation mean nothing"
    ]
    (warning,) = warnings(valid=[(f"t{i}", "Another question?", f"{i}") for i in range(5)] + plenty("v"))
    assert warning.startswith("5 pictures stand in both train.jsonl and valid.jsonl (valid.jsonl:1, valid.jsonl:2, ")
    assert "valid.jsonl:3, …)" in warning


def test_warning_of_repeated_examples():
    assert warnings(train=plenty("t") + plenty("t")[:2]) == [
        "2 examples repeat an earlier one word for word (train.jsonl:41, train.jsonl:42)"
    ]


def test_warning_of_contradicting_answers():
    lines = [("t0", "question 0", "Something else."), ("t0", "Question 1?", "Answer 1!")]
    assert warnings(train=plenty("t") + lines) == [
        "1 question is asked of its picture more than once, with different answers (train.jsonl:41)"
    ]


@pytest.mark.parametrize(("lines", "expected"), [(19, 1), (20, 0)])
def test_warning_of_a_small_validation_set(lines, expected):
    found = [warning for warning in warnings(valid=plenty("v", lines)) if "has only" in warning]
    assert len(found) == expected
    assert all(warning == "valid.jsonl has only 19 examples: one answer moves the accuracy by 5%" for warning in found)


@pytest.mark.parametrize(("times", "expected"), [(36, 0), (37, 1)])
def test_warning_of_one_answer_for_all(times, expected):
    lines = [(f"v{i}", "Is it safe?", "Yes." if i < times else f"no {i}") for i in range(40)]
    found = warnings(valid=lines)
    assert len(found) == expected
    assert all(text == '"Yes." is 92% of the answers in valid.jsonl: there is little else to learn' for text in found)


def test_table():
    train = dataset(
        "a/very/long/path/that/goes/on/and/on/train.jsonl",
        [("a", "Is it?", "line one\nline two \x1b[2J" + "x" * 200), ("b", "Is it?", "はい" * 40), ("c", "Was?", "Ja.")],
        skipped=TRAIN.skipped,
    )
    valid = dataset("valid.jsonl", [*plenty("v", 9), ("a", "Is it?", "No.")])
    lines = format_table(summarize(train, valid)).splitlines()
    text = "\n".join(lines)
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in text
    assert lines[0].split() == ["th/that/goes/on/and/on/train.jsonl", "valid.jsonl"]
    assert ["examples", "3", "10"] in [line.split() for line in lines]
    assert "skipped: picture not found    5 (train.jsonl:6, train.jsonl:7, t" in text
    assert "baseline accuracy             0.0%" in text
    assert "warning: 1 picture stands in both" in text
    assert "warning: valid.jsonl has only 10 examples" in text


def test_columns_of_a_table_count_wide_characters_twice():
    assert cell("はい", 6) == "はい  "
    assert cell("はいはい", 5) == "はい "


def test_a_hundred_thousand_examples_take_seconds():
    lines = [(f"p{i // 3}", f"Question {i % 5}?", f"answer {i % 50}") for i in range(100_000)]
    started = time.perf_counter()
    summarize(dataset("train.jsonl", lines), dataset("valid.jsonl", plenty("v")))
    assert time.perf_counter() - started < 15
