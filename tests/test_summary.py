"""The facts about the data, the warnings, and the table in the terminal."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from moondream2 import summary
from moondream2.summary import format_left_out, format_table, left_out_by_reason, remarked, summarize


def dataset(name, lines, sizes=None, skipped=(), remarks=None):
    """A dataset of (picture, question, answer) lines; prompts have a token a word, answers one more."""
    examples = [
        SimpleNamespace(
            picture=picture,
            question=question,
            answer=answer,
            answers=(answer,),
            source=f"{name}:{number}",
            prompt_ids=question.split(),
            answer_ids=[*answer.split(), "<end>"],
        )
        for number, (picture, question, answer) in enumerate(lines, start=1)
    ]
    pictures = {picture: SimpleNamespace(size=(sizes or {}).get(picture, (640, 480))) for picture, *_ in lines}
    facts = {"examples": examples, "pictures": pictures, "skipped": list(skipped), "remarks": remarks or {}}
    return SimpleNamespace(path=Path(name), **facts)


def plenty(letter, lines=40):
    """Unobtrusive lines, of which nothing has to be warned."""
    return [(f"{letter}{i // 2}", f"Question {i % 2}?", f"answer {i % 10}") for i in range(lines)]


def warnings(train=None, valid=None, test=None):
    train, valid = dataset("train.jsonl", train or plenty("t")), dataset("valid.jsonl", valid or plenty("v"))
    return summarize(train, valid, test and dataset("test.jsonl", test))["warnings"]


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
            "picture not found": {"count": 5, "sources": ["train.jsonl:6", "train.jsonl:7", "train.jsonl:8"]},
            "picture broken": {"count": 1, "sources": ["train.jsonl:11"]},
        },
    }


def test_ten_answers_at_most():
    facts = summarize(dataset("t", [("a", f"Question {i}?", f"answer {i}") for i in range(30)]), TRAIN)["train"]
    assert (facts["different_answers"], len(facts["answers"])) == (30, 10)


def test_summary_is_plain_data():
    data = summarize(TRAIN, dataset("valid.jsonl", plenty("v")))
    assert json.loads(json.dumps(data)) == data


def test_baseline():
    valid = dataset("valid.jsonl", [("v", "Is it safe to cross?", "yes"), ("v", "How many cars?", "3")])
    assert summarize(TRAIN, valid)["baseline_accuracy"] == 0.5


def test_no_warning_without_a_reason():
    assert warnings() == []


def test_warning_of_a_leak_goes_by_content():
    assert warnings(valid=[("t3", "Another question?", "other"), *plenty("v")]) == [
        "1 picture stands in both train.jsonl and valid.jsonl (valid.jsonl:1): a leak makes validation mean nothing"
    ]
    (warning,) = warnings(valid=[(f"t{i}", "Another question?", f"{i}") for i in range(5)] + plenty("v"))
    assert warning.startswith("5 pictures stand in both train.jsonl and valid.jsonl (valid.jsonl:1, valid.jsonl:2, ")
    assert "valid.jsonl:3, …)" in warning


def test_warning_of_a_leak_into_the_test():
    """From both other files; and all else that is warned of is, in a test file too."""
    assert warnings(test=plenty("p")) == []
    shared = [("t3", "Another question?", "other"), ("v0", "What?", "that"), ("v1", "What?", "this")]
    assert warnings(test=[*shared, *plenty("p")]) == [
        "1 picture stands in both train.jsonl and test.jsonl (test.jsonl:1): a leak makes the test mean nothing",
        "2 pictures stand in both valid.jsonl and test.jsonl (test.jsonl:2, test.jsonl:3): a leak makes the test mean "
        "nothing",
    ]
    assert warnings(test=plenty("p", 8) + plenty("p", 1)) == [
        "1 example repeats an earlier one word for word (test.jsonl:9)",
        "test.jsonl has only 9 examples: one answer moves the accuracy by 11%",
    ]


def test_warning_of_repeated_examples():
    assert warnings(train=plenty("t") + plenty("t")[:2]) == [
        "2 examples repeat an earlier one word for word (train.jsonl:41, train.jsonl:42)"
    ]


def test_warning_of_contradicting_answers():
    lines = [("t0", "question 0", "Something else."), ("t0", "Question 1?", "Answer 1!")]
    assert warnings(train=plenty("t") + lines) == [
        "1 question is asked of its picture more than once, with different answers (train.jsonl:41)"
    ]


def test_answers_of_which_one_is_right_for_both_are_no_contradiction():
    train = dataset("train.jsonl", plenty("t") + [("t0", "question 0", "a"), ("t0", "question 0", "b")])
    for example, answers in zip(train.examples[-2:], [("A", "answer 0"), ("b", "a")], strict=True):
        example.answers = answers
    found = summarize(train, dataset("valid.jsonl", plenty("v")))["warnings"]
    assert [each for each in found if "different answers" in each] == [
        "1 question is asked of its picture more than once, with different answers (train.jsonl:42)"
    ]


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        ("<image>\nWhat?", "b", "<image>"),
        ("Question: What?", "b", "Question:"),
        ("What?\n\nAnswer:", "b", "Answer:"),
        ("What?", "a <|endoftext|> b", "<|endoftext|>"),
        ("<|im_start|>What?", "[INST] b </s>", "<|im_start|>, [INST], </s>"),
    ],
)
def test_warning_of_a_formats_words(question, answer, words):
    (found,) = [each for each in warnings(train=[*plenty("t"), ("x", question, answer)]) if "format" in each]
    assert sorted(found.split(": ", 1)[1].removesuffix(" (train.jsonl:41)").split(", ")) == sorted(words.split(", "))
    assert found.startswith("1 example has words of a format in question or answer, taken as plain text: ")


def test_no_warning_of_words_that_only_look_alike():
    lines = [("x", "What is the Answer: 5?", "a < b | c > d"), ("y", "Which Question: is it?", "<b>x</b>, [1]")]
    assert not [each for each in warnings(train=plenty("t") + lines) if "format" in each]


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


def test_what_decoding_told_is_counted_by_pictures_and_named_by_the_first_line_of_each():
    remarks = {"t1": ["scaled", "of one colour"], "t3": ["scaled"], "t9": ["scaled"], "v0": ["scaled"], "x": ["gone"]}
    train, valid = (dataset(f"{name}.jsonl", plenty(name[0]), remarks=remarks) for name in ("train", "valid"))
    told = ["scaled: 4 (train.jsonl:3, train.jsonl:7, train.jsonl:19, …)", "of one colour: 1 (train.jsonl:3)"]
    assert summarize(train, valid)["warnings"] == remarked(train, valid) == told
    assert format_left_out([("valid.jsonl:4", "picture broken: a.png")], told).splitlines() == [
        "left out:  picture broken: 1 (valid.jsonl:4)",
        f"warning:   {told[0]}",
        f"warning:   {told[1]}",
    ]
    leaked = dataset("valid.jsonl", [("t1", "Q", "A"), *plenty("v")], remarks=remarks)
    assert remarked(train, leaked) == told  # a picture in both files is one


def test_lines_left_out_are_counted_by_reason_and_the_first_are_named():
    later = [("valid.jsonl:4", "picture broken: images/4.jpg: the file has changed")]
    assert left_out_by_reason(TRAIN.skipped, later) == [
        {
            "when": "as the files were read",
            "reason": "picture not found",
            "count": 5,
            "sources": ["train.jsonl:6", "train.jsonl:7", "train.jsonl:8"],
        },
        {"when": "as the files were read", "reason": "picture broken", "count": 1, "sources": ["train.jsonl:11"]},
        {"when": "during the run", "reason": "picture broken", "count": 1, "sources": ["valid.jsonl:4"]},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal
# ---------------------------------------------------------------------------------------------------------------------

PATH = "a/path/that/is/longer/than/half/the/table/train.jsonl"


def hostile(path="train.jsonl"):
    """Answers that a terminal or a markup language would act on, or that are wide or long."""
    lines = [
        ("a", "Is it?", "one\ntwo \x1b[2J" + "x" * 200),
        ("b", "Is it?", "はい" * 40),
        ("c", "Was?", "[bold]Ja.[/bold] :car:"),
    ]
    return dataset(path, lines, skipped=TRAIN.skipped)


def table(train=None, valid=None):
    train, valid = train or dataset("train.jsonl", plenty("t")), valid or dataset("valid.jsonl", plenty("v"))
    return format_table(summarize(train, valid))


def test_table():
    valid = dataset("valid.jsonl", [*plenty("v", 9), ("a", "Is it?", "No.")])
    assert table(TRAIN, valid).splitlines() == [
        "                            train.jsonl                                         valid.jsonl",
        "examples                    5                                                   10",
        "pictures                    3                                                   6",
        "different answers           3                                                   10",
        "questions per picture       1, at most 3                                        2, at most 2",
        "prompt tokens               5, at most 5                                        2, at most 2",
        "answer tokens               2, at most 3                                        3, at most 3",
        "picture sizes               60 x 60 to 4000 x 3000                              640 x 480",
        "most frequent answers        60% Yes.                                            10% answer 0",
        "                             20% two                                             10% answer 1",
        "                             20% No, wait.                                       10% answer 2",
        "skipped: picture not found  5 (train.jsonl:6, train.jsonl:7, train.jsonl:8, …)  -",
        "skipped: picture broken     1 (train.jsonl:11)                                  -",
        "baseline:  0.0% accuracy, by always giving a question's most frequent answer",
        "warning:   1 picture stands in both train.jsonl and valid.jsonl (valid.jsonl:10): a leak makes",
        "           validation mean nothing",
        "warning:   5 lines name a picture that is not there, of 11 in train.jsonl",
        "warning:   valid.jsonl has only 10 examples: one answer moves the accuracy by 10%",
    ]


def test_a_test_file_has_its_column_and_its_baseline():
    train = dataset("train.jsonl", [*plenty("t"), ("t99", "What?", "that"), ("t99", "Why?", "so")])
    test = dataset("test.jsonl", [("p", "What?", "that"), ("p", "Why?", "no"), ("q", "Why?", "so"), ("q", "?", "x")])
    found = summarize(train, dataset("valid.jsonl", plenty("v")), test)
    assert found["test"]["examples"] == 4 and found["test_baseline_accuracy"] == 0.5
    lines = format_table(found).splitlines()
    assert [line.split()[-3:] for line in lines[:3]] == [
        ["train.jsonl", "valid.jsonl", "test.jsonl"],
        ["42", "40", "4"],
        ["21", "20", "2"],
    ]
    baseline = f"{found['baseline_accuracy']:.1%} accuracy (50.0% on the test), by always giving a question's most"
    assert f"baseline:  {baseline}" in lines[-4] + lines[-3] + lines[-2]
    assert "test" not in summarize(train, train)


def test_files_are_named_by_their_names_or_where_these_are_the_same_by_their_paths():
    heading = table(dataset(PATH, plenty("t")), dataset("valid.jsonl", plenty("v"))).splitlines()[0]
    assert heading.split() == ["train.jsonl", "valid.jsonl"] and PATH.endswith("/train.jsonl")
    both = table(dataset(PATH, plenty("t")), dataset(PATH, plenty("v"))).splitlines()
    columns = zip(*map(str.split, both[:2]), strict=True)
    assert ["".join(column) for column in columns] == [PATH, PATH]


def test_answers_are_text_to_the_terminal():
    text = table(hostile())
    assert "[bold]Ja.[/bold] :car:" in text
    assert " 33% one two [2Jxxx" in text


def test_a_file_name_moves_no_cursor():
    lines = table(hostile("tr\x1b[2Jain.jsonl")), format_left_out([("tr\x1b[2Jain.jsonl:1", "picture\rbroken")])
    assert not set("\x1b\r") & set("".join(lines))


def test_wide_characters_take_two_columns():
    lines = [line for line in table(hostile()).splitlines() if "10% answer" in line]
    assert "はい" * 7 + "… " in lines[1]
    assert len({cell_len(line[: line.index("10%")]) for line in lines}) == 1


@pytest.mark.parametrize(("is_terminal", "width"), [(False, 100), (True, 60)])
def test_the_table_is_as_wide_as_the_terminal_and_in_a_log_always_the_same(monkeypatch, is_terminal, width):
    monkeypatch.setattr(summary.sys.stdout, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI services do
    monkeypatch.setenv("TERM", "dumb")
    lines = table(dataset("train.jsonl", plenty("t") + plenty("t"))).splitlines()
    assert width - 20 < max(map(len, lines)) <= width
    assert "\x1b" not in "".join(lines)


def test_the_table_is_text_in_a_notebook_as_well(monkeypatch):
    expected = table()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert table() == expected


def test_what_decoding_told_is_named_by_reason():
    broken = [(f"train.jsonl:{i}", f"picture broken: images/{i}.jpg: truncated") for i in range(4)]
    assert format_left_out(broken) == "left out:  picture broken: 4 (train.jsonl:0, train.jsonl:1, train.jsonl:2, …)"
    assert format_left_out([]) == ""
