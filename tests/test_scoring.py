"""What counts as a right answer, and the baseline."""

from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moondream2.scoring import accuracy, baseline_accuracy, is_correct, most_frequent_answers, normalize


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Ja.", "ja"),
        ("  A  red\tcar ", "red car"),
        ("The light is GREEN, walk!", "light is green walk"),
        ("zero", "0"),
        ("two", "2"),
        ("None.", "0"),
        ("Ten", "10"),
        ("Don't cross", "dont cross"),
        ("Don’t cross", "dont cross"),
        ("1,000 people", "1000 people"),
        ("1,5", "1 5"),
        ("3.5 m.", "3.5 m"),
        ("U.S.", "us"),
        ("-5 °C", "-5 °c"),
        ("\u22125 °C", "-5 °c"),
        ("3-4", "3 4"),
        ("50%", "50%"),
        ("$5", "$5"),
        ("`yes`", "yes"),
        ("ｆｕｌｌ ５", "full 5"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("「はい」。", "はい"),
        ("हाँ।", "हाँ"),
        ("A.", "a"),
        ("(a)", "a"),
        (" ?! ", "?!"),
        ("🚦", "🚦"),
        ("", ""),
    ],
)
def test_normalize(answer, expected):
    assert normalize(answer) == expected


@given(st.text() | st.text(alphabet="aAnthe o1.,-'’%_ 5?", max_size=12))
@example("1,.000")
@example("the _a")
@example("A.\u0300-0")
def test_normalizing_twice_changes_nothing(answer):
    assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize(("prediction", "answer"), [("5", "-5"), ("5", "50"), ("no", "yes"), ("?", "!"), ("A", "B")])
def test_different_answers_stay_different(prediction, answer):
    assert not is_correct(prediction, (answer,))


def test_accuracy_is_the_fraction_that_is_right_of_what_was_asked():
    assert accuracy([True, False, None, True]) == pytest.approx(2 / 3)
    assert accuracy([None]) is None
    assert accuracy([]) is None


def examples(*pairs):
    return [SimpleNamespace(question=question, answer=answer, answers=(answer,)) for question, answer in pairs]


TRAIN = examples(
    ("Is it safe?", "Yes."),
    ("is it safe", "yes"),
    ("Is it safe?", "No."),
    ("Is it safe?", "Yes."),
    ("How many?", "two"),
    ("How many?", "3"),
)


def test_most_frequent_answers_are_by_question_and_in_their_usual_spelling():
    assert most_frequent_answers(TRAIN) == {"is it safe": "Yes.", "how many": "two"}


def test_ties_do_not_depend_on_the_order_of_the_file():
    assert most_frequent_answers(TRAIN[::-1]) == most_frequent_answers(TRAIN)


def test_baseline_goes_by_question_and_by_all_answers_for_an_unseen_one():
    valid = examples(("Is it safe?", "yes"), ("how many", "2"), ("Is it raining?", "Yes!"), ("Is it night?", "no"))
    assert baseline_accuracy(TRAIN, valid) == 0.75


def test_a_hyphen_is_a_minus_only_where_a_number_begins():
    assert normalize("B-4") == normalize("b 4") and normalize("3-4") == normalize("3 4")
    assert normalize("-4") != normalize("4") and normalize("at -4 degrees") != normalize("at 4 degrees")
