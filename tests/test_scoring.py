"""What counts as a right answer, by each metric, and the baseline."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moondream2.scoring import anls, baseline_accuracy, is_correct, is_exact, mean, most_frequent_answers, normalize
from tests.shared import ROOT

PAGE = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")


def rows(heading):
    """The first three cells of each row of the table under a heading of docs/scoring.md, without backquotes."""
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (.*)\|$", part, re.M)
    assert len(found) == len(re.findall("^\\|", part, re.M)) - 2  # but its head
    return found


@pytest.mark.parametrize(("one", "other", "why"), rows("The same answer"))
def test_the_same_answer(one, other, why):
    assert is_correct(one, other) and is_correct(other, one)


@pytest.mark.parametrize(("one", "other", "why"), rows("Different answers"))
def test_different_answers(one, other, why):
    assert not is_correct(one, other) and not is_correct(other, one)


@pytest.mark.parametrize(("right", "answered", "expected"), rows("ANLS"))
def test_anls_of_the_page(right, answered, expected):
    assert f"{anls(answered, right):.2f}" == expected.strip()


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


@given(st.text() | st.text(alphabet="aAnthe o1.,-'’%_ 5?+#*/:$²½⁻♭٣–^", max_size=12))
@example("1,.000")
@example("the _a")
@example("A.\u0300-0")
def test_normalizing_twice_changes_nothing(answer):
    assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize(("prediction", "answer"), [("5", "-5"), ("5", "50"), ("no", "yes"), ("?", "!"), ("A", "B")])
def test_different_answers_stay_different(prediction, answer):
    assert not is_correct(prediction, (answer,))


def test_one_of_several_right_answers_is_right():
    answers = ("Two.", "a pair")
    assert is_correct("2", answers) and is_correct("Pair", answers) and not is_correct("3", answers)
    assert is_exact(" a pair", answers) and is_exact("Two.", answers) and not is_exact("Two", answers)
    assert anls("a pear", answers) == anls("a pear", answers[::-1]) == anls("a pear", "a pair") == 1 - 2 / 6


def test_a_text_is_one_answer_and_not_its_letters():
    assert is_correct("yes", "Yes.") and is_exact("Yes.", "Yes.") and anls("Yes.", "Yes.") == 1
    assert not is_correct("y", "yes") and not is_exact("y", "yes") and anls("y", "yes") == 0


@given(*[st.text(alphabet="abc ", max_size=8)] * 2)
def test_anls_is_by_the_edit_distance(right, answered):
    right, answered = " ".join(right.split()), " ".join(answered.split())
    distances = {(i, j): max(i, j) for i in range(len(right) + 1) for j in range(len(answered) + 1) if not i * j}
    for i, one in enumerate(right, start=1):
        for j, other in enumerate(answered, start=1):
            replaced = distances[i - 1, j - 1] + (one != other)
            distances[i, j] = min(replaced, distances[i - 1, j] + 1, distances[i, j - 1] + 1)
    longer = max(len(right), len(answered), 1)
    similarity = 1 - distances[len(right), len(answered)] / longer
    assert anls(answered, right) == pytest.approx(similarity if similarity >= 0.5 else 0)


def test_half_of_the_text_right_counts_as_half():
    """As in DocVQA's own program; its paper leaves this out."""
    assert anls("abxy", "abcd") == 0.5 and anls("axyz", "abcd") == 0


def test_the_mean_is_over_what_was_asked():
    assert mean([True, False, None, True]) == pytest.approx(2 / 3)
    assert mean([0.25, None, 1.0]) == 0.625
    assert mean([None]) is None
    assert mean([]) is None


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
    valid[3].answers = ("no", "yes")
    assert baseline_accuracy(TRAIN, valid) == 1


def test_a_hyphen_is_a_minus_only_where_a_number_begins():
    assert normalize("B-4") == normalize("b 4") and normalize("3-4") == normalize("3 4")
    assert normalize("-4") != normalize("4") and normalize("at -4 degrees") != normalize("at 4 degrees")
