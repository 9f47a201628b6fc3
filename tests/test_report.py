"""The report and the model card: what they say, and that the report works in a browser."""

import base64
import errno
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from moondream2 import report
from moondream2.card import model_card
from moondream2.charts import PALETTE
from moondream2.cli import InputError
from moondream2.data import Example
from moondream2.modeling_moondream2 import Answer
from moondream2.report import facts, headline, machine, predictions, result_warnings, scores_of, write_report

EVIL = "</script><script>window.evil = 1</script>\"'><img src=nothing onerror='window.evil = 1'>{{ 7 * 7 }}"


def prediction(file, number, question, answer, before, after):
    return {
        "image_path": f"images/{file.name}",
        "file": str(file),
        "source": f"valid.jsonl:{number}",
        "question": question,
        "answer": answer,
        "answers": [answer],
        "before": before,
        "before_probability": None if before is None else 0.5,
        "before_cut": None if before is None else False,
        "after": after,
        "after_probability": 0.75,
        "after_cut": False,
    } | {
        f"{when}_{metric}": None if said is None else said == answer
        for when, said in (("before", before), ("after", after))
        for metric in ("correct", "exact", "anls")
    }


def facts_of(name):
    return {
        "path": name,
        "examples": 4,
        "pictures": 2,
        "questions_per_picture": {"median": 2, "most": 2},
        "prompt_tokens": {"median": 9, "most": 12},
        "answer_tokens": {"median": 3, "most": 7},
        "different_answers": 2,
        "answers": [["Yes.", 3], ["Two cars.", 1]],
        "picture_sizes": {"smallest": [20, 30], "median": [40, 30], "largest": [50, 60]},
        "skipped": {},
    }


def history(*losses, accuracies=None):
    """Records of (training, validation) losses by epoch, the first of them before training."""
    return [
        {
            "epoch": epoch,
            "train_loss": train,
            "valid_loss": valid,
            "valid_accuracy": accuracies and accuracies[epoch],
            "learning_rate": None if epoch == 0 else 3e-5,
            "seconds": 75.0,
        }
        for epoch, (train, valid) in enumerate(losses)
    ]


def make_run(predictions=(), **changes):
    run = {
        "title": "crossings",
        "model": {"id": "vikhyatk/moondream2", "revision": "92d3d73"},
        "history": history((None, 3.0), (2.0, 1.7), (1.0, 1.5), (0.5, 1.9), accuracies=[0.25, 0.5, 0.75, 0.5]),
        "kept_epoch": 2,
        "data": {
            "train": facts_of("train.jsonl"),
            "valid": facts_of("valid.jsonl"),
            "baseline_accuracy": 0.4,
            "warnings": [],
        },
        "sets": [{"name": "validation", "predictions": list(predictions)}],
        "names": None,
        "left_out": [],
        "constants": {"EPOCHS": 3, "LEARNING_RATE": 3e-5},
        "machine": {"torch": "2.13.0", "device": "cpu", "seconds": 3725.0, "peak_memory_gib": 8.215},
    }
    return run | changes


def scored(predictions):
    """A run that scores a saved model without training."""
    untrained = [{name: None if name.startswith("before") else each[name] for name in each} for each in predictions]
    return make_run(untrained, history=history((None, 1.5), accuracies=[0.5]), kept_epoch=None, data=None)


@pytest.fixture
def answers(tmp_path):
    """Four questions on three pictures, of which one is gone and one is no picture."""
    whole, gone, broken = (tmp_path / name for name in ("whole.jpg", "gone.jpg", "broken.jpg"))
    Image.new("RGB", (900, 600), "teal").save(whole)
    broken.write_bytes(b"\xff\xd8\xff not a picture")
    return [
        prediction(whole, 1, "Is it safe to cross?", "Yes.", before="No.", after="Yes."),
        prediction(whole, 2, "How many cars?", "Two cars.", before="Two cars.", after="Three cars."),
        prediction(gone, 3, "Is it safe to cross?", "Yes.", before="Yes.", after="Yes."),
        prediction(broken, 4, "Is it raining?", "No.", before="Maybe.", after=""),
    ]


@pytest.fixture
def open_page(driver, tmp_path):
    """Writes and opens a report; whatever a test does on it, it must log no error and ask for nothing but itself."""
    path = tmp_path / "report.html"
    driver.get("data:,")  # the last of what is logged before this test
    driver.get_log("performance"), driver.get_log("browser")

    def open_it(run, width=1400, scheme="light"):
        write_report(path, run)
        scheme = {"name": "prefers-color-scheme", "value": scheme}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(path.as_uri())
        return driver

    yield open_it
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
    assert driver.get_log("browser") == []


def shown(page, selector):
    return [each.text for each in page.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]


def chips(page):
    return [" ".join(text.split()) for text in shown(page, ".chip")]


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def said(before=(), after=(), **changes):
    """The headline and the warnings of a run whose answers were right before and after training as these say."""
    pairs = enumerate(zip(before, after, strict=True))
    answers = [
        prediction(Path(f"{i}.jpg"), i, "Is it?", "Yes.", *("Yes." if each else "No." for each in pair))
        for i, pair in pairs
    ]
    run = make_run(answers, **changes)
    return headline(run, scores_of(run)), list(result_warnings(scores_of(run)))


def test_the_headline_is_the_change_in_accuracy():
    assert said([0] * 20, [0] * 5 + [1] * 15)[0] == "Training raised accuracy by 75 points (95% interval 55 to 95)."


def test_the_headline_is_of_the_last_set(answers):
    lines = [prediction(Path(f"{i}.jpg"), i, "Is it?", "Yes.", "No.", "Yes.") for i in range(30)]
    run = make_run()
    run["sets"] = [{"name": "validation", "predictions": answers}, {"name": "test", "predictions": lines}]
    scores = scores_of(run)
    assert headline(run, scores) == "Training raised accuracy by 100 points (95% interval 81 to 100)."
    assert scores["after"].questions == 30 and scores["baseline"] is None
    run["sets"][1]["baseline"] = 0.3
    assert scores_of(run)["baseline"] == 0.3


def test_the_headline_without_answers_is_of_the_loss():
    losses = history((None, 3.0), (2.0, 1.7))
    assert said(history=losses, kept_epoch=1)[0] == "Validation loss fell from 3.0000 to 1.7000."
    assert said(history=history((None, 1.7), (2.0, 1.70001)), kept_epoch=1)[0] == "Validation loss stayed at 1.7000."
    assert said(history=history((None, 1.5)), kept_epoch=None)[0] == "Validation loss is 1.5000."
    assert said(history=[], kept_epoch=None)[0] == "Nothing was measured."


def test_the_headline_of_a_saved_model(answers):
    run = scored(answers)
    assert headline(run, scores_of(run)) == (
        "Accuracy is 50% (too few pictures for an interval), of 4 questions on 3 pictures."
    )


def test_warning_that_the_baseline_is_not_beaten():
    data = {**make_run()["data"], "baseline_accuracy": 0.75}
    assert said([0] * 20, [0, 1] * 10, data=data)[1][0] == (
        "Training did not beat the baseline: giving each question its most frequent answer scores 75.0%."
    )


def test_warning_that_the_baseline_lies_within_the_interval():
    assert said([0] * 20, [0, 1] * 10)[1][0] == (
        "The interval of its accuracy, 50% (95% interval 25 to 75%), holds the baseline: giving each question its most "
        "frequent answer scores 40.0%."
    )


def test_warning_that_accuracy_fell():
    losses = history((None, 3.0), (2.0, 1.7))
    assert said([1] * 18 + [0] * 2, [1] * 16 + [0] * 4, history=losses, kept_epoch=1)[1] == [
        "Accuracy fell from 90.0% to 80.0%: the model answered better before training."
    ]


def test_warning_of_overfitting():
    assert said()[1] == [
        "It overfits after epoch 2: by the last epoch, validation loss rose from 1.5000 to 1.9000 while training loss "
        "fell from 1.0000 to 0.5000."
    ]


def test_no_warning_without_a_reason():
    losses = history((None, 3.0), (2.0, 1.7), (1.0, 1.5), accuracies=[0.25, 0.5, 0.75])
    assert said([0] * 20, [1] * 20, history=losses)[1] == []


def test_page_of_a_run(open_page, answers):
    data = {**make_run()["data"], "warnings": ["2 pictures stand in both files"]}
    page = open_page(make_run(answers, data=data))
    text = page.find_element(By.TAG_NAME, "main").text
    for words in (
        "No change in 4 questions on 3 pictures.",
        "Of 4 validation questions on 3 pictures, the model answers 2 wrong.",
        "Accuracy\n50.0%",
        "50.0% before training",
        "Epoch 2 of 3 was the best",
        "without a look at the picture, scores 40.0%",
        "It overfits after epoch 2",
        "2 pictures stand in both files",
        "20 × 30, 40 × 30, 50 × 60",
        "LEARNING_RATE 3e-05",
        "Time 1 h 2 min",
        "Peak memory 8.21 GiB",
        "Torch 2.13.0",
        "92d3d73",
    ):
        assert words in text
    assert shown(page, ".kept") == ["2 ★ kept 1.0000 1.5000 75.0% 3e-05 1 min 15 s"]
    assert shown(page, ".question dl")[1].splitlines() == [
        *(
            "Expected",
            "Two cars.",
            "Before",
            "✓ right",
            "Two cars. 50% sure",
            "After",
            "✗ wrong",
            "Three cars. 75% sure",
        )
    ]


def test_each_metric_is_named_with_its_mean_before_and_after(open_page, answers):
    answers[1]["after_anls"], answers[0]["after_exact"] = 0.75, False
    page = open_page(make_run(answers))
    assert shown(page, ".metrics tr") == [
        "Metric Before After",
        "Accuracy: the same answer once case, articles, punctuation and number words are set aside 50.0% 50.0%",
        "Exact match: the same answer, character for character 50.0% 25.0%",
        "ANLS: for longer answers, the share of the text that is right, by edit distance; less than half is 0 "
        "50.0% 68.8%",
    ]
    page = open_page(scored(answers))
    assert [row.rsplit(maxsplit=1)[1] for row in shown(page, ".metrics tr")] == ["Answer", "50.0%", "25.0%", "68.8%"]
    assert shown(open_page(make_run()), ".metrics") == []


def test_charts_say_in_words_what_they_show(open_page, answers):
    page = open_page(make_run(answers))
    assert [chart.accessible_name for chart in page.find_elements(By.CSS_SELECTOR, ".chart")] == [
        "Right by probability. Expected calibration error: 25.0%. 70% to 80% sure: 4 answers, 50% right.",
        "Right when the least sure are left unanswered. 100% answered: 50% right.",
        "Loss by epoch. training: first 2.0000 (epoch 1), best 0.5000 (epoch 3), last 0.5000 (epoch 3). "
        "validation: first 3.0000 (epoch 0), best 1.5000 (epoch 2), last 1.9000 (epoch 3). kept: epoch 2.",
        "Accuracy by epoch. validation: first 25.0% (epoch 0), best 75.0% (epoch 2), last 50.0% (epoch 3). "
        "baseline: 40.0%. kept: epoch 2.",
    ]


def drawn(page):
    """The SVG of each chart that a browser shows."""
    sources = page.execute_script("return [...document.querySelectorAll('.chart')].map(each => each.currentSrc)")
    return [base64.b64decode(each.removeprefix("data:image/svg+xml;base64,")).decode() for each in sources]


def test_charts_have_every_line(open_page, answers):
    page = open_page(make_run(answers))
    labels = [
        set(re.findall("<!-- (.*) -->", svg)) for svg in drawn(page)
    ]  # matplotlib names so what it draws as paths
    assert {"right", "as often as it is sure", "4", "probability of the answer"} <= labels[0]
    assert {"right", "95%", "questions answered, the surest first"} <= labels[1]
    assert {"training", "validation", "kept: epoch 2", "epoch"} <= labels[2]
    assert {"validation", "baseline", "kept: epoch 2", "40%"} <= labels[3]
    widths = page.execute_script("return [...document.querySelectorAll('.chart')].map(each => each.naturalWidth)")
    assert len(widths) == 4 and min(widths) > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_and_page_have_the_same_colours(open_page, answers, scheme):
    page = open_page(make_run(answers), scheme=scheme)
    variable = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])"
    assert {name: page.execute_script(variable, f"--{name}") for name in PALETTE[scheme]} == PALETTE[scheme]
    for svg in drawn(page):
        used = set(re.findall("#[0-9a-f]{6}", svg))
        assert {PALETTE[scheme][name] for name in ("ink", "muted", "line", "first")} <= used
        assert used <= set(PALETTE[scheme].values())


def test_lines_left_out(open_page):
    left_out = [
        {"when": "as the files were read", "reason": "too long", "count": 1, "sources": ["train.jsonl:7"]},
        {"when": "during the run", "reason": "picture broken", "count": 4, "sources": ["a:1", "a:2", "a:3"]},
    ]
    page = open_page(make_run(left_out=left_out))
    assert page.find_element(By.CSS_SELECTOR, "section:has(#left-out)").text.splitlines() == [
        "Left out",
        "too long, as the files were read 1 (train.jsonl:7)",
        "picture broken, during the run 4 (a:1, a:2, a:3, …)",
    ]


def test_no_part_for_lines_left_out_where_there_are_none(open_page):
    assert shown(open_page(make_run()), "h2") == ["Training", "Data", "How it was made"]


def test_page_of_a_saved_model(open_page, answers):
    page = open_page(scored(answers))
    assert shown(page, "h2") == ["How sure an answer is", "Metrics", "Pictures", "How it was made"]
    assert chips(page) == ["All 4", "Wrong now 2"]
    assert {text.splitlines()[2] for text in shown(page, ".question dl")} == {"Answer"}


def test_losses_that_were_not_finite(open_page):
    page = open_page(make_run(history=history((None, None), (None, None), (0.5, None)), kept_epoch=2))
    assert shown(page, ".numbers tbody tr") == [
        "0 (before) – – – – 1 min 15 s",
        "1 – – – 3e-05 1 min 15 s",
        "2 ★ kept 0.5000 – – 3e-05 1 min 15 s",
    ]
    assert "validation: no numbers" in page.find_element(By.CSS_SELECTOR, ".chart").accessible_name


@pytest.fixture
def streets(tmp_path):
    """A question about 16 pictures, of which six show no green: it says yes to four of them, three times quite sure."""
    said = (
        [("No.", "Yes.", sure) for sure in (0.9, 0.35, 0.8, 0.7)]
        + [("No.", "No.", 0.9)] * 2
        + [("Yes.", "Yes.", 0.95)] * 10
    )
    found = []
    for i, (answer, after, sure) in enumerate(said):
        Image.new("RGB", (60, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
        made = prediction(tmp_path / f"{i}.png", i, "Is it safe to cross?", answer, before="Yes.", after=after)
        found.append(made | {"after_probability": sure})
    return found


def test_the_largest_mistake_is_shown_with_its_pictures(open_page, streets):
    page = open_page(make_run(streets))
    assert shown(page, ".mistakes li") == [
        "Is it safe to cross?\nSaid Yes. for No. 4 times of 6. The surest was 90% sure."
    ]
    assert shown(page, "h2")[:2] == ["What kind of mistakes", "How sure an answer is"]
    evidence = page.find_elements(By.CSS_SELECTOR, ".evidence a")
    assert [each.find_element(By.TAG_NAME, "img").get_attribute("alt") for each in evidence] == [
        f"images/{number}.png" for number in (0, 2, 3, 1)
    ]
    page.find_elements(By.CLASS_NAME, "chip")[2].click()  # newly right: two others
    evidence[1].click()
    assert page.find_element(By.CSS_SELECTOR, ".card:target .file").text == "images/2.png"
    assert chips(page)[0] == "All 16" and page.find_element(By.CSS_SELECTOR, "[value=all]").is_selected()


def test_what_was_said_is_shown_against_what_was_true(open_page, streets):
    page = open_page(make_run(streets))
    assert shown(page, ".asked summary") == ["Is it safe to cross? 12 of 16 right, 75% (95% interval 50 to 94%)"]
    assert shown(page, ".answers tr") == [
        "Right answer said Yes. said No. said something else Found (recall) Right when said (precision)",
        "Yes. 10 0 0 100% 71%",
        "No. few: 6 4 2 0 33% 100%",
    ]
    assert shown(page, ".answers .miss") == ["4"] and shown(page, ".answers .hit") == ["10", "2"]


def test_a_question_with_few_examples_or_without_a_table_says_so(open_page, streets):
    alike = [{**each, "question": "Is it day?", "answers": ["Yes."]} for each in streets[-6:]]
    many = [
        {**each, "question": "How many?", "answers": [str(i)], "after_correct": False} for i, each in enumerate(streets)
    ]
    page = open_page(make_run([*many, *alike]))
    assert shown(page, ".asked summary") == [
        "How many? 0 of 16 right, 0% (95% interval 0 to 17%)",
        "Is it day? 6 of 6 right, 100% (95% interval 61 to 100%) few examples",
    ]
    page.find_elements(By.CSS_SELECTOR, ".asked summary")[1].click()
    assert shown(page, ".asked p") == [
        "No table: it has too many different right answers.",
        "No table: it has one right answer.",
    ]


def test_questions_beyond_the_cap_are_counted(open_page, streets, monkeypatch):
    monkeypatch.setattr(report, "MOST_QUESTIONS", 1)
    page = open_page(make_run([*streets, *({**each, "question": "Is it day?"} for each in streets[-6:])]))
    assert len(shown(page, ".asked summary")) == 1
    assert "1 more questions, with fewer wrong answers, are not shown." in shown(page, "section > p")


def test_how_sure_an_answer_is(open_page, streets):
    streets[0]["after_cut"] = True
    text = open_page(make_run(streets)).find_element(By.CSS_SELECTOR, "section:has(#trust)").text
    assert text.startswith(
        "How sure an answer is\nAbove 0.90 it answers 62% of the questions, and 100% (95% interval 74 to 100%) of "
        "those are right. On average it is "
    )
    assert "On average it is 88% sure and right in 75%; its probabilities are off by 13 points" in text
    assert "1 of its answers were cut off: their probability is that of what there is." in text


def test_two_sets_stand_apart(open_page, streets):
    """The verdict is the test set's, and the validation set's is said to look better than it is."""
    test = [{**each, "image_path": f"test/{i}.png", "after_correct": i > 6} for i, each in enumerate(streets)]
    run = make_run(streets)
    run["sets"].append({"name": "test", "predictions": test, "baseline": 0.3})
    page = open_page(run)
    text = page.find_element(By.TAG_NAME, "header").text
    assert (
        "Of 16 test questions on 16 pictures, the model answers 7 wrong. On the validation questions accuracy is 75% "
        in text
    )
    assert "which tends to look better than it is, as the epoch was chosen by them" in text
    assert "Accuracy, test questions\n56.2%" in text and "Baseline\n30.0%" in text
    curve = page.find_elements(By.CSS_SELECTOR, "section:has(#training) .chart")[1]
    assert "baseline: 40.0%" in curve.accessible_name  # of the validation, as is the curve
    assert shown(page, "h2")[:3] == ["What kind of mistakes", "How sure an answer is", "The validation questions"]
    page.find_element(By.CSS_SELECTOR, ".more > summary").click()
    assert [each.split()[3] for each in shown(page, ".mistakes p:nth-child(2)")] == ["No.", "No."]
    assert len(page.find_elements(By.CLASS_NAME, "card")) == 32
    page.find_element(By.CSS_SELECTOR, ".more .evidence a").click()
    assert page.find_element(By.CSS_SELECTOR, ".card:target .file").text == "images/0.png (validation)"


def test_two_models_are_compared(open_page, streets):
    streets[-1] |= {"before": "yes", "before_correct": True}
    run = make_run(streets, history=[], kept_epoch=None, data=None, names={"before": "old", "after": "new"})
    page = open_page(run)
    assert page.find_element(By.TAG_NAME, "h1").text == (
        "16 questions on 16 pictures can't tell the lead of new, 12 points, from chance (95% interval 0 to 31)."
    )
    assert "2 of 16 questions are answered differently: 2 right only by new, 0 only by old." in shown(page, ".lead")[0]
    assert shown(page, ".tiles dt") == ["Accuracy of new", "Accuracy of old"]
    assert shown(page, ".metrics tr")[0] == "Metric old new"
    assert chips(page) == ["All 16", "Different answers 2", "Right only: new 2", "Right only: old 0"]
    assert shown(page, ".question dt")[:3] == ["Expected", "old", "new"]


# ---------------------------------------------------------------------------------------------------------------------
# What it is made from
# ---------------------------------------------------------------------------------------------------------------------


def dataset(name, skipped=()):
    """Two examples on a picture."""
    texts = [("Is it safe to cross?", "Yes."), ("How many cars?", "Two.")]
    examples = [
        Example(f"{name}:{i}", "a.jpg", question, (answer, "a pair"), picture="key", prompt_ids=[1], answer_ids=[2])
        for i, (question, answer) in enumerate(texts, start=1)
    ]
    pictures = {"key": SimpleNamespace(path=Path("images/a.jpg"))}
    return SimpleNamespace(path=Path(name), examples=examples, pictures=pictures, skipped=list(skipped))


CONSTANTS = SimpleNamespace(
    model_id="vikhyatk/moondream2",
    revision="92d3d73",
    train_file="train.jsonl",
    valid_file="valid.jsonl",
    output_dir="crossings",
    learning_rate=3e-5,
    lora_rank=None,
    tiles=True,
)
SKIPPED = [(f"train.jsonl:{i}", f"picture not found: {i}.jpg") for i in range(5)]
LEFT_OUT = [["valid.jsonl:7", "picture broken: 7.jpg: the file has changed"]]


def test_predictions_are_of_what_was_asked():
    valid = dataset("valid.jsonl")
    key = valid.examples[1].key
    before, after = {key: Answer("a pear", 0.25, True)}, {key: Answer("2", 0.5, False)}
    assert predictions(valid, before, after) == [
        {
            "source": "valid.jsonl:2",
            "image_path": "a.jpg",
            "file": str(Path("images/a.jpg")),
            "question": "How many cars?",
            "answer": "Two.",
            "answers": ["Two.", "a pair"],
            "before": "a pear",
            "before_probability": 0.25,
            "before_cut": True,
            "before_correct": False,
            "before_exact": False,
            "before_anls": 1 - 2 / 6,  # from "a pair"
            "after": "2",
            "after_probability": 0.5,
            "after_cut": False,
            "after_correct": True,
            "after_exact": False,
            "after_anls": 0.0,
        }
    ]
    (alone,) = predictions(valid, {}, after)
    assert {alone[name] for name in alone if name.startswith("before")} == {None}


def test_an_answer_that_was_cut_is_marked_and_all_right_ones_are_shown(open_page, answers):
    answers[0] |= {"answers": ["Yes.", "Sure."], "before_cut": True}
    answers[1] |= {"after_cut": True}
    page = open_page(make_run(answers))
    page.execute_script("document.querySelector('.card').scrollIntoView()")
    first, second = page.find_elements(By.CLASS_NAME, "question")[:2]
    told = [[each.text.replace("\n", " ") for each in q.find_elements(By.TAG_NAME, "dd")] for q in (first, second)]
    cut = "cut off here: it was longer"
    assert told == [
        ["Yes. / Sure.", f"✗ wrong No. 50% sure {cut}", "✓ right Yes. 75% sure"],
        ["Two cars.", "✓ right Two cars. 50% sure", f"✗ wrong Three cars. 75% sure {cut}"],
    ]


def test_a_question_without_an_answer_to_compare_with_is_shown(open_page, answers):
    answers[0] |= {"answer": None, "answers": [], "after_correct": None}
    question = open_page(scored(answers)).find_element(By.CLASS_NAME, "question")
    assert question.text.split("\n")[:3] == ["Is it safe to cross?", "Answer", "Yes. 75% sure"]
    assert question.get_attribute("data-states").split() == ["all"]


def test_facts_are_what_the_report_shows(open_page):
    valid = dataset("valid.jsonl")
    said = {example.key: Answer("Yes.", 0.9, False) for example in valid.examples}
    answers = predictions(valid, {}, said)
    run, sets = make_run(), [{"name": "validation", "predictions": answers}]
    parts = run["data"], run["history"], run["kept_epoch"], sets, SKIPPED, LEFT_OUT
    made = facts("crossings", CONSTANTS, *parts, machine(torch.device("cpu"), 12.34))
    assert json.loads(json.dumps(made)) == made
    assert made.keys() == run.keys()
    text = open_page(made).find_element(By.TAG_NAME, "main").text
    for words in (
        "LEARNING_RATE 3e-05",
        "picture not found, as the files were read 5 (train.jsonl:0, train.jsonl:1, train.jsonl:2, …)",
        "picture broken, during the run 1 (valid.jsonl:7)",
        "Time 12 s",
    ):
        assert words in text


def test_peak_memory_is_what_the_process_held_at_most():
    peak, now = machine(torch.device("cpu"), 1.0)["peak_memory_gib"], psutil.Process().memory_info().rss
    assert now / 2**30 - 0.01 <= peak < psutil.virtual_memory().total / 2**30


@pytest.mark.skipif(sys.platform == "win32", reason="has no getrusage")
@pytest.mark.parametrize(("platform", "expected"), [("linux", 5 << 10), ("darwin", 5)])
def test_peak_memory_is_in_the_unit_of_the_system(monkeypatch, platform, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    assert report.peak_memory() == expected


def test_peak_memory_on_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # there is no such module
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert runpy.run_path(report.__file__)["peak_memory"]() == 5


def card(skipped=(), left_out=(), epochs=None):
    epochs = epochs or history((None, 3.0), (2.0, 1.7), accuracies=[None, 0.5])
    progress = SimpleNamespace(history=epochs, best_epoch=1, left_out=left_out)
    return model_card(CONSTANTS, progress, dataset("train.jsonl", skipped), dataset("valid.jsonl"))


def test_card():
    lines = card().splitlines()
    for line in (
        "# crossings",
        "vikhyatk/moondream2 at revision 92d3d73, fine-tuned with its vision encoder frozen.",
        "- train.jsonl: 2 examples on 1 pictures",
        "| 0 | – | 3.0000 | – |",
        "| 1 | 2.0000 | 1.7000 | 50.0% |",
        "The weights are those of epoch 1. Epoch 0 is the model before training.",
        "LEARNING_RATE = 3e-05",
    ):
        assert line in lines
    code = card().split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "'Is it safe to cross?'" in code


def test_card_begins_with_what_the_hub_reads():
    """No pipeline_tag, of which the hub would make a line of Python that raises."""
    head = ["---", "base_model: vikhyatk/moondream2", "library_name: transformers", "license: apache-2.0", "---"]
    assert card().splitlines()[:5] == head


def test_card_says_what_was_left_out():
    assert card(SKIPPED, LEFT_OUT).split("## Left out\n\n")[1].split("\n\n##")[0].splitlines() == [
        "- picture not found, as the files were read: 5 (train.jsonl:0, train.jsonl:1, train.jsonl:2, …)",
        "- picture broken, during the run: 1 (valid.jsonl:7)",
    ]
    assert "Left out" not in card()


def test_card_of_losses_that_were_not_finite():
    assert "| 1 | – | – | – |" in card(epochs=history((None, 3.0), (None, None))).splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def thumbnails(path):
    encoded = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', path.read_text())
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in encoded]


def test_one_small_thumbnail_for_each_picture_that_can_be_read(tmp_path, answers):
    write_report(tmp_path / "report.html", make_run(answers))
    assert [image.size for image in thumbnails(tmp_path / "report.html")] == [(320, 213)]


def test_thumbnails_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.new("RGB", (60, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    turned = prediction(tmp_path / "turned.jpg", 1, "Is it red?", "Yes.", None, "Yes.")
    write_report(tmp_path / "report.html", make_run([turned]))
    assert [image.size for image in thumbnails(tmp_path / "report.html")] == [(20, 60)]


def test_placeholder_for_a_picture_that_is_gone_or_broken(open_page, answers):
    page = open_page(make_run(answers))
    assert shown(page, ".missing") == ["The picture is gone or can’t be read."] * 2
    page.find_element(By.TAG_NAME, "html").send_keys(Keys.END)  # what is out of sight need not be decoded
    broken = "return [...document.images].some(image => image.complete && !image.naturalWidth)"
    assert not page.execute_script(broken)


def test_pictures_beyond_the_cap_are_the_uneventful_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_PICTURES", 3)
    pairs = [("Yes.", "Yes."), ("Yes.", "Yes."), ("Yes.", "No."), ("No.", "Yes."), ("No.", "No."), ("Yes.", "Yes.")]
    cases = [prediction(tmp_path / f"{i}.jpg", i, "Is it?", "Yes.", *pair) for i, pair in enumerate(pairs)]
    write_report(tmp_path / "report.html", make_run(cases))
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"text\">images/(\d).jpg", page) == ["2", "3", "4"]
    assert "3 of 6 pictures are not shown" in page


# ---------------------------------------------------------------------------------------------------------------------
# In the browser
# ---------------------------------------------------------------------------------------------------------------------


def test_filters(open_page, answers):
    page = open_page(make_run(answers))
    assert chips(page) == ["All 4", "Wrong now 2", "Newly right 1", "Newly wrong 1"]
    expected = {
        "All": ["valid.jsonl:1", "valid.jsonl:2", "valid.jsonl:4", "valid.jsonl:3"],
        "Wrong now": ["valid.jsonl:2", "valid.jsonl:4"],
        "Newly right": ["valid.jsonl:1"],
        "Newly wrong": ["valid.jsonl:2"],
    }
    for chip in page.find_elements(By.CLASS_NAME, "chip"):
        chip.click()
        assert shown(page, ".source") == expected[chip.text.rsplit(maxsplit=1)[0].strip()]
    assert shown(page, ".file") == ["images/whole.jpg"]
    assert shown(page, "#shown") == ["1 question on 1 picture"]


def test_filters_by_keyboard(open_page, answers):
    page = open_page(make_run(answers))
    page.execute_script("document.querySelector('[type=radio]').focus()")
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert shown(page, ".source") == ["valid.jsonl:2", "valid.jsonl:4"]
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys("RAIN" + Keys.ENTER)
    assert shown(page, ".source") == ["valid.jsonl:4"]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("safe CROSS", [1, 3]),
        ("three cars", [2]),
        ("whole.jpg", [1, 2]),
        ("maybe", [4]),
        ("jsonl:3", [3]),
        ("rain cross", []),
        ("expected", []),
    ],
)
def test_search(open_page, answers, words, numbers):
    page = open_page(make_run(answers))
    page.find_element(By.CSS_SELECTOR, "[type=search]").send_keys(words)
    assert shown(page, ".source") == [f"valid.jsonl:{number}" for number in numbers]
    assert chips(page)[0] == f"All {len(numbers)}"
    assert ("No question matches." in shown(page, "#shown")) == (not numbers)


def test_everything_from_the_data_is_text(open_page, tmp_path):
    evil = {**prediction(tmp_path / "x.jpg", 1, EVIL, EVIL, EVIL, EVIL), "image_path": EVIL, "source": EVIL}
    others = [prediction(tmp_path / f"{i}.jpg", i, EVIL, f"{EVIL} {i % 2}", EVIL, f"{EVIL} 1") for i in range(5)]
    names = {"before": EVIL, "after": EVIL}
    file = {**facts_of(EVIL), "answers": [[EVIL, 4]]}
    left_out = [{"when": EVIL, "reason": EVIL, "count": 1, "sources": [EVIL]}]
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    page = open_page(
        make_run(
            [evil, *others],
            names=names,
            title=EVIL,
            model={"id": EVIL, "revision": EVIL},
            data={"train": file, "valid": file, "baseline_accuracy": 0.1, "warnings": [EVIL]},
            left_out=left_out,
            constants={EVIL: EVIL},
            machine={EVIL: EVIL},
        )
    )
    page.execute_script("document.querySelector('.card').scrollIntoView()")  # out of sight it has no text
    assert set(shown(page, ".ask")) == {EVIL}
    assert page.find_element(By.CSS_SELECTOR, ".card img").get_attribute("alt") == EVIL
    assert page.title == f"{EVIL}: report"
    assert page.execute_script("return [document.scripts.length, document.images.length, window.evil]") == [1, 5, None]
    text = page.execute_script("return document.querySelector('main').textContent")
    assert text.count(EVIL) == 75


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overflows_sideways(open_page, tmp_path, width):
    long = "x" * 400
    wide = prediction(tmp_path / "x.jpg", 1, long, long, long, long) | {"image_path": long, "source": long}
    wrong = [prediction(tmp_path / "y.jpg", i, long, f"{long} {i}", long, f"{long} 1") for i in range(5)]
    file = {**facts_of(long), "answers": [[long, 4]]}
    left_out = [{"when": long, "reason": long, "count": 1, "sources": [long]}]
    data = {"train": file, "valid": file, "baseline_accuracy": 0.1, "warnings": [long]}
    run = make_run(
        [wide, *wrong], title=long, data=data, left_out=left_out, constants={long: long}, machine={long: long}
    )
    page = open_page(run, width)
    width_of = "return document.documentElement"
    assert page.execute_script(f"{width_of}.scrollWidth") == page.execute_script(f"{width_of}.clientWidth")
    page.execute_script("document.querySelector('.card').scrollIntoView()")
    sticks_out = """return [...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll')
        && each.getBoundingClientRect().right > innerWidth).map(each => each.outerHTML.slice(0, 80))"""
    assert page.execute_script(sticks_out) == []


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)" or "#rrggbb", as WCAG 2 defines it."""
    numbers = re.findall(r"\d+", colour)[:3] if colour.startswith("rgb") else bytes.fromhex(colour[1:])
    parts = [int(number) / 255 for number in numbers]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(open_page, answers, scheme):
    page = open_page(make_run(answers), scheme=scheme)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    background = luminance(page.execute_script(style, ".panel", "backgroundColor"))
    assert (background < 0.1) == (scheme == "dark")
    texts = ("h1", ".muted", ".source", ".mark.right", ".mark.wrong", ".kept td")
    colours = {selector: page.execute_script(style, selector, "color") for selector in texts}
    colours |= {name: PALETTE[scheme][name] for name in ("ink", "muted", "first", "second")}  # the charts'
    for name, colour in colours.items():
        dark, light = sorted([background, luminance(colour)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


# ---------------------------------------------------------------------------------------------------------------------
# On the disk
# ---------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_report_before(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, make_run())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_report(path, make_run(title="another"))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_path_with_half_a_character(tmp_path):
    write_report(tmp_path / "report.html", make_run(constants={"TRAIN_FILE": "tr\udce4ning.jsonl"}))
    assert "tr?ning.jsonl" in (tmp_path / "report.html").read_text()


def test_the_page_fetches_nothing_and_runs_its_own_script_alone(tmp_path, answers):
    nonces = set()
    for _ in range(2):
        write_report(tmp_path / "report.html", make_run(answers))
        page = (tmp_path / "report.html").read_text()
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
        (nonce,) = set(re.findall(r'<script nonce="([^"]+)">', page))
        nonces.add(nonce)
        assert sorted(policy.split("; ")) == [
            "base-uri 'none'",
            "default-src 'none'",
            "form-action 'none'",
            "img-src data:",
            f"script-src 'nonce-{nonce}'",
            "style-src 'unsafe-inline'",
        ]
    assert len(nonces) == 2 and min(map(len, nonces)) > 16


def test_a_large_photo_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    sizes, upright = [], report.upright_rgb
    monkeypatch.setattr(report, "upright_rgb", lambda image: (sizes.append(image.size), upright(image))[1])
    Image.new("RGB", (4000, 3000), "red").save(tmp_path / "photo.jpg")
    assert report.thumbnail(tmp_path / "photo.jpg")
    assert sizes == [(1000, 750)]


def test_of_a_gpu_its_name_and_its_own_memory_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    told = machine(torch.device("cuda"), 1.0)
    assert (told["device"], told["peak_memory_gib"]) == ("a card", 3.0)
