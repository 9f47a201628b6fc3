"""What is made of answers: intervals against enumeration, loops and chance; tables and curves against counting."""

import random
from itertools import product

import numpy as np
import pytest

from moondream2 import log
from moondream2 import verdict as module
from moondream2.verdict import (
    DRAWS,
    accuracy_of,
    by_question,
    draw_means,
    estimate,
    expanded_tails,
    gain_of,
    mistake_in_words,
    mistakes_of,
    reliability,
    selective,
    sentences,
    sureness,
    table,
    threshold,
    trust_in_words,
    verdict,
    with_interval,
)


def prediction(
    picture, after=None, before=None, sure=0.5, cut=False, question="Is it safe?", said="", answers=("Yes",)
):
    """A question about a picture and whether it was answered right after and before training."""
    return {
        "file": f"{picture}.jpg",
        "question": question,
        "answers": list(answers),
        "before_correct": before,
        "after": said,
        "after_correct": after,
        "after_probability": sure,
        "after_cut": cut,
    }


def asked(right, pictures=None, **others):
    """Predictions that are right or wrong, each of a picture of its own unless `pictures` says so."""
    pictures = range(len(right)) if pictures is None else pictures
    return [prediction(picture, bool(each), **others) for picture, each in zip(pictures, right, strict=True)]


def said(question, *cells, picture=0):
    """Predictions of (right answers, what was said, times), a picture each."""
    return [
        prediction(
            f"{question}{answers}{answer}{i}", answer in answers, question=question, said=answer, answers=answers
        )
        for answers, answer, times in cells
        for i in range(times)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# How sure is the figure
# ---------------------------------------------------------------------------------------------------------------------


def test_draws_have_the_distribution_of_all_that_can_be_drawn():
    """Five pictures of 1 to 4 questions can be drawn in 3125 ways, each as likely."""
    sums, counts = np.array([1, 0, 2, 3, 1]), np.array([1, 2, 2, 4, 1])
    ways = [list(way) for way in product(range(5), repeat=5)]
    expected = np.sort([sums[way].sum() / counts[way].sum() for way in ways])
    drawn = draw_means(sums, counts)
    assert len(drawn) == DRAWS
    for x in np.unique(expected):
        assert abs((drawn <= x + 1e-9).mean() - (expected <= x + 1e-9).mean()) < 0.015


def test_an_interval_is_that_of_a_plain_loop_over_pictures():
    draw = random.Random(3)
    pictures = [draw.randrange(40) for _ in range(150)]
    habits = {picture: draw.random() for picture in pictures}
    right = [draw.random() < habits[picture] for picture in pictures]
    groups = [[r for p, r in zip(pictures, right, strict=True) if p == each] for each in sorted(set(pictures))]
    means = []
    for _ in range(20_000):
        drawn = draw.choices(groups, k=len(groups))
        means.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    found = estimate(right, pictures)
    assert (found.value, found.questions, found.pictures) == (sum(right) / 150, 150, len(groups))
    assert [found.low, found.high] == pytest.approx(np.quantile(means, expanded_tails(len(groups))), abs=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """The questions of a picture hang together; where each is taken for a picture, a third of the intervals miss."""
    draw, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(60):
        right = draw.binomial(1, np.repeat(draw.beta(0.7, 0.3, 30), 8))
        for_pictures, for_questions = estimate(right, np.arange(240) // 8), estimate(right, np.arange(240))
        held += for_pictures.low <= 0.7 <= for_pictures.high
        naive += for_questions.low <= 0.7 <= for_questions.high
    assert held >= 56 and naive <= 42


def test_tails_are_those_of_students_t():
    for degrees, quantile in ((4, 2.776), (9, 2.262), (23, 2.069), (99, 1.984)):  # of a printed table
        assert module.t_quantile(0.975, degrees) == pytest.approx(quantile, abs=0.01)
    assert expanded_tails(24) == pytest.approx([0.01730, 0.98270], abs=1e-4)  # by hand from the 2.0687
    assert expanded_tails(10**6)[0] == pytest.approx(0.025, abs=1e-5)


def test_an_interval_is_the_same_whenever_and_in_whatever_order():
    draw = random.Random(0)
    right, pictures = [draw.random() for _ in range(90)], [draw.randrange(30) for _ in range(90)]
    assert estimate(right, pictures)[1:3] == estimate(right, pictures)[1:3]
    marks = [each > 0.4 for each in right]
    assert estimate(marks, pictures) == estimate(marks[::-1], pictures[::-1])


def test_where_all_pictures_agree_the_interval_is_by_the_rule_of_three():
    assert accuracy_of(asked([1] * 30))[1:3] == pytest.approx((0.05 ** (1 / 30), 1))
    assert accuracy_of(asked([0] * 30))[1:3] == pytest.approx((0, 1 - 0.05 ** (1 / 30)))
    assert 1 - accuracy_of(asked([1] * 300)).low == pytest.approx(3 / 300, rel=0.01)
    pairs = asked([1, 0] * 20, pictures=np.arange(40) // 2)
    least = 0.05 ** (1 / 20)
    assert accuracy_of(pairs)[:3] == pytest.approx((0.5, least / 2, least / 2 + 1 - least))
    unchanged = [{**each, "before_correct": each["after_correct"]} for each in asked([1, 0] * 10)]
    assert gain_of(unchanged)[:3] == pytest.approx((0, least - 1, 1 - least))


def test_four_pictures_have_no_interval_and_five_do():
    assert accuracy_of(asked([1, 0, 1, 0, 0], pictures="aabcd")) == (0.4, None, None, 5, 4)
    assert accuracy_of(asked([1, 0, 1, 0, 0])).low is not None
    assert with_interval(accuracy_of(asked([1]))) == "100% (too few pictures for an interval)"


def test_of_nothing_asked_there_is_nothing_to_say():
    unscored = [prediction(i) for i in range(9)]
    for nothing in ([], unscored):
        assert accuracy_of(nothing) is gain_of(nothing) is verdict(nothing) is None
        assert reliability(nothing) is threshold(nothing) is trust_in_words(nothing) is None
        assert selective(nothing) == by_question(nothing) == []


def test_a_gain_is_of_the_questions_that_were_answered_twice():
    """It is paired: what both got right or wrong says nothing about the change, and makes it no less sure."""
    pairs = [prediction(i, after=i < 60, before=i < 50) for i in range(100)]
    gain, accuracy = gain_of([*pairs, prediction("new", after=True)]), accuracy_of(pairs)
    assert (gain.value, gain.questions) == (0.1, 100)
    assert gain.high - gain.low < 0.7 * (accuracy.high - accuracy.low)
    draw = random.Random(0)
    changes = [each["after_correct"] - each["before_correct"] for each in pairs]
    means = [sum(draw.choices(changes, k=100)) / 100 for _ in range(10_000)]
    assert [gain.low, gain.high] == pytest.approx(np.quantile(means, expanded_tails(100)), abs=0.011)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ([0] * 60 + [1] * 40, [0] * 30 + [1] * 70, "Training raised accuracy by 30 points (95% interval 21 to 39)"),
        ([1] * 70 + [0] * 30, [1] * 40 + [0] * 60, "Training lowered accuracy by 30 points (95% interval 21 to 39)"),
        (
            [1] * 50 + [0] * 50,
            [0] * 2 + [1] * 52 + [0] * 46,
            "100 questions on 100 pictures can't tell the gain of 2 points from chance (95% interval -3 to 7)",
        ),
        (
            [1] * 50 + [0] * 50,
            [0] * 4 + [1] * 48 + [0] * 48,
            "100 questions on 100 pictures can't tell the loss of 2 points from chance (95% interval -3 to 7)",
        ),
        ([1, 0] * 50, [1, 0] * 50, "No change in 100 questions on 100 pictures (95% interval -3 to 3)"),
        ([0, 1], [1, 0], "No change in 2 questions on 2 pictures"),
        ([0] * 3, [1] * 3, "It takes more than 3 questions on 3 pictures to tell the gain of 100 points from chance"),
        ([0], [1], "It takes more than 1 question on 1 picture to tell the gain of 100 points from chance"),
        ([None] * 40, [1] * 30 + [0] * 10, "Accuracy is 75% (95% interval 60 to 88%), of 40 questions on 40 pictures"),
    ],
)
def test_verdict_in_words(before, after, sentence):
    pairs = zip(after, before, strict=True)
    assert verdict([prediction(i, *pair) for i, pair in enumerate(pairs)]) == sentence


def test_a_narrow_interval_has_decimals():
    many = [prediction(i, after=i < 5020, before=i < 5000) for i in range(10_000)]
    assert verdict(many) == "Training raised accuracy by 0.2 points (95% interval 0.1 to 0.3)"
    assert verdict([prediction(i, i % 50 > 0, i % 50 > 1) for i in range(300)]).startswith(
        "Training raised accuracy by 2.0 p"
    )


def test_of_two_models_the_better_one_is_named():
    names = {"before": "old", "after": "new"}
    pairs = [prediction(i, after=i < 70, before=i < 40) for i in range(100)]
    swapped = [
        {**each, "before_correct": each["after_correct"], "after_correct": each["before_correct"]} for each in pairs
    ]
    words = "is right more often than {}, by 30 points (95% interval 21 to 39)"
    assert verdict(pairs, names) == f"new {words.format('old')}"
    assert verdict(swapped, names) == f"old {words.format('new')}"
    close = [prediction(i, after=i < 51, before=i < 50) for i in range(100)]
    assert verdict(close, names).startswith(
        "100 questions on 100 pictures can't tell the lead of new, 1.0 points, from chance (95%"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What kind of mistake
# ---------------------------------------------------------------------------------------------------------------------


SURE = [number / 100 for number in range(100)]


def test_a_table_counts_what_was_true_against_what_was_said():
    answers = said(
        "Is it safe?",
        (["Yes."], "Yes.", 20),
        (["Yes."], "No.", 3),
        (["No."], "Yes.", 7),
        (["no"], "No.", 9),
        (["No."], "no", 21),
    )
    answers += said("Is it safe?", (["No."], "Maybe.", 2), (["No."], "Perhaps.", 1), (["Unclear."], "No.", 1))
    found = table([{**each, "after_probability": sure} for sure, each in zip(SURE, answers, strict=False)])
    assert found["answers"] == ["No.", "Yes.", "Unclear."]
    assert [row["counts"] for row in found["rows"]] == [[30, 7, 0, 3], [3, 20, 0, 0], [1, 0, 0, 0]]
    assert [(row["asked"], row["said"], row["few"]) for row in found["rows"]] == [
        (40, 34, False),
        (23, 27, False),
        (1, 0, True),
    ]
    assert [row["recall"] for row in found["rows"]] == [30 / 40, 20 / 23, 0]
    assert [row["precision"] for row in found["rows"]] == [30 / 34, 20 / 27, None]
    assert list(map(mistake_in_words, found["mistakes"])) == [
        '"Is it safe?": said "Yes." for "No." 7 times of 40',
        '"Is it safe?": said "No." for "Yes." 3 times of 23',
        '"Is it safe?": said something else ("Maybe.", …) for "No." 3 times of 40',
        '"Is it safe?": said "No." for "Unclear." once of 1',
    ]
    worst = found["mistakes"][0]
    assert worst["surest"] == 0.29 and [each["after_probability"] for each in worst["predictions"]] == SURE[23:30]


def test_of_several_right_answers_the_one_that_was_given_is_true_else_the_first():
    both = ["Red", "Crimson"]
    found = table(said("Which?", (both, "crimson!", 2), (both, "Blue", 3), (["Blue"], "Blue", 4)))
    assert found["answers"] == ["Blue", "Red", "Crimson"]
    assert [row["counts"] for row in found["rows"]] == [[4, 0, 0, 0], [3, 0, 0, 0], [0, 0, 2, 0]]


def test_a_question_with_one_right_answer_or_with_many_has_no_table():
    assert table(said("Is it?", (["Yes"], "Yes", 9), (["Yes"], "No", 9))) is None
    each = [([str(number)], "0", 2) for number in range(9)]
    assert table(said("How many?", *each)) is None
    assert len(table(said("How many?", *each[:8]))["answers"]) == 8


def test_questions_stand_by_their_wrong_answers_whatever_their_spelling():
    answers = said("Is it safe?", (["Yes"], "Yes", 8), (["No"], "Yes", 1)) + said("is it SAFE", (["No"], "No", 1))
    answers += said("Is it red?", (["Yes"], "No", 5), (["No"], "No", 1)) + said("Asked four times?", (["a"], "b", 4))
    found = by_question(answers)
    assert [each["question"] for each in found] == ["Is it red?", "Is it safe?"]
    assert [each["few"] for each in found] == [True, False]
    assert found[0]["accuracy"] == accuracy_of(answers[10:16]) and found[1]["accuracy"].value == 0.9
    assert [mistake["times"] for mistake in mistakes_of(found)] == [5, 1]


# ---------------------------------------------------------------------------------------------------------------------
# How sure is an answer
# ---------------------------------------------------------------------------------------------------------------------


def test_reliability_is_that_of_a_plain_loop():
    draw = random.Random(1)
    answers = [prediction(i, draw.random() < 0.6, sure=draw.random(), cut=i < 3) for i in range(500)]
    answers += [prediction("sure", True, sure=1.0), prediction("edge", False, sure=0.7), prediction("unscored")]
    found, error = reliability(answers), 0.0
    scored = answers[:-1]
    for i, each in enumerate(found["bins"]):
        inside = [a for a in scored if min(int(a["after_probability"] * 10), 9) == i]
        sure = sum(a["after_probability"] for a in inside) / len(inside)
        right = sum(a["after_correct"] for a in inside) / len(inside)
        assert each == {"count": len(inside), "probability": pytest.approx(sure), "accuracy": pytest.approx(right)}
        error += len(inside) / len(scored) * abs(sure - right)
    assert found["error"] == pytest.approx(error)
    assert found["accuracy"] == pytest.approx(sum(a["after_correct"] for a in scored) / len(scored))
    assert found["probability"] == pytest.approx(sum(a["after_probability"] for a in scored) / len(scored))
    assert found["cut"] == 3


def test_a_range_of_probability_without_answers_is_empty():
    bins = reliability([prediction(0, True, sure=0.05)])["bins"]
    assert bins[0]["count"] == 1 and bins[1:] == [{"count": 0, "probability": None, "accuracy": None}] * 9


def test_the_least_sure_are_left_unanswered_first_and_those_as_sure_together():
    answers = [
        prediction(i, bool(right), sure=sure)
        for i, (sure, right) in enumerate([(0.2, 0), (0.9, 1), (0.5, 1), (0.5, 0)])
    ]
    assert selective(answers) == [(0.25, 1.0), (0.75, 2 / 3), (1.0, 0.5)]


def test_a_threshold_is_the_lowest_above_which_95_percent_are_right():
    answers = [prediction(i, i > 0, sure=0.901) for i in range(58)] + [
        prediction(f"u{i}", i < 20, sure=0.9) for i in range(42)
    ]
    least, accuracy = threshold(answers)
    assert (least, accuracy) == (0.9, accuracy_of(answers[:58]))
    assert trust_in_words(answers) == (
        "Above 0.90 it answers 58% of the questions, and 98% (95% interval 95 to 100%) of those are right"
    )


def test_where_all_can_be_trusted_none_is_left_out():
    assert trust_in_words(asked([1] * 30)) == "Of all its answers 100% (95% interval 90 to 100%) are right"


def test_where_no_threshold_makes_enough_of_them_right_it_says_so():
    answers = [prediction(i, i % 4 > 0, sure=0.77) for i in range(40)] + [
        prediction(f"u{i}", False, sure=0.1) for i in range(40)
    ]
    assert trust_in_words(answers).startswith(
        "No probability makes 95% of the answers right: above 0.10 it answers 50% of the questions, and 75% (95% inter"
    )


def test_a_threshold_leaves_ten_answers():
    answers = [prediction(i, True, sure=0.9) for i in range(9)] + [
        prediction(f"u{i}", i < 2, sure=0.1) for i in range(9)
    ]
    assert threshold(answers)[0] is None
    assert threshold(answers[:9]) is None


def test_a_probability_is_never_told_to_be_none_or_all():
    assert [sureness(each) for each in (1.0, 0.996, 0.994, 0.5, 0.006, 0.001)] == [
        *("over 99%", "over 99%", "99%", "50%", "1%", "under 1%")
    ]


def test_what_a_run_says_at_its_end():
    answers = said("Is it safe?", (["No"], "Yes", 6), (["No"], "No", 4), (["Yes"], "Yes", 20))
    assert sentences(answers) == [
        "Accuracy is 80% (95% interval 63 to 93%), of 30 questions on 30 pictures",
        'Largest mistake: "Is it safe?": said "Yes" for "No" 6 times of 10',
        "No probability makes 95% of the answers right: of all its answers 80% (95% interval 63 to 93%) are right",
    ]
    assert sentences([]) == [] and len(sentences(answers[:4])) == 1


def test_what_is_said_of_two_models():
    answers = said("Is it safe?", (["No"], "Yes", 6), (["No"], "No", 4), (["Yes"], "Yes", 20))
    others = [{**each, "before": "yes", "before_correct": each["answers"] == ["Yes"]} for each in answers]
    assert sentences(others, {"before": "old", "after": "new"})[1:] == [
        "4 of 30 questions are answered differently: 4 right only by new, 0 only by old",
        'Largest mistake of new: "Is it safe?": said "Yes" for "No" 6 times of 10',
        "new: no probability makes 95% of the answers right: of all its answers 80% (95% interval 63 to 93%) are right",
    ]


def test_of_several_sets_the_last_is_told_in_full_under_its_name(capsys):
    answers = said("Is it safe?", (["No"], "Yes", 6), (["No"], "No", 4), (["Yes"], "Yes", 20))
    full = sentences(answers)
    log.verdict([{"name": "validation", "predictions": answers}])
    assert capsys.readouterr().out.splitlines() == full
    log.verdict([{"name": "validation", "predictions": answers}, {"name": "test", "predictions": answers}])
    assert capsys.readouterr().out.splitlines() == [f"Validation: {full[0]}", *(f"Test: {each}" for each in full)]
    log.verdict([{"name": "validation", "predictions": []}])
    assert capsys.readouterr().out == ""
