"""The report: what it says, and that it works in a browser."""

import base64
import errno
import io
import json
import os
import re
import shutil

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from moondream2 import report
from moondream2.cli import InputError
from moondream2.report import scores_of, verdict, warnings, write_report

EVIL = "</script><script>window.evil = 1</script>\"'><img src=nothing onerror='window.evil = 1'>{{ 7 * 7 }}"
CHROMIUM_OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage
    --disable-background-networking --disable-component-update --disable-sync"""


def prediction(file, number, question, answer, before, after):
    return {
        "image_path": f"images/{file.name}",
        "file": str(file),
        "place": f"valid.jsonl:{number}",
        "question": question,
        "answer": answer,
        "before": before,
        "after": after,
        "before_correct": None if before is None else before == answer,
        "after_correct": after == answer,
    }


def facts(name):
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
        "skipped": {"picture not found": {"count": 5, "places": [f"{name}:7", f"{name}:8", f"{name}:9"]}},
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
            "train": facts("train.jsonl"),
            "valid": facts("valid.jsonl"),
            "baseline_accuracy": 0.4,
            "warnings": [],
        },
        "predictions": list(predictions),
        "constants": {"EPOCHS": 3, "LEARNING_RATE": 3e-5},
        "machine": {"torch": "2.13.0", "device": "cpu", "seconds": 3725.0, "peak_memory_gib": 8.215},
    }
    return run | changes


def scored(predictions):
    """A run that scores a saved model without training."""
    untrained = [{**each, "before": None, "before_correct": None} for each in predictions]
    return make_run(untrained, history=history((None, 1.5), accuracies=[0.5]), kept_epoch=None, data=None)


@pytest.fixture
def predictions(tmp_path):
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


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        (pytest.fail if "CI" in os.environ else pytest.skip)("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*CHROMIUM_OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options, Service(chromedriver))
    yield made
    made.quit()


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


def said(**changes):
    scores = scores_of(make_run(**changes))
    return verdict(scores), list(warnings(scores))


def test_verdict_goes_from_before_training_to_the_kept_epoch():
    assert said()[0] == "Accuracy rose from 25.0% to 75.0%."


def test_verdict_without_a_change():
    losses = history((None, 3.0), (2.0, 1.7), accuracies=[0.5, 0.5])
    assert said(history=losses, kept_epoch=1)[0] == "Accuracy stayed at 50.0%."


def test_verdict_without_accuracy_is_of_the_loss():
    losses = history((None, 3.0), (2.0, 1.7), accuracies=[None, None])
    assert said(history=losses, kept_epoch=1)[0] == "Validation loss fell from 3.0000 to 1.7000."


def test_verdict_counts_the_answers_where_the_history_has_no_accuracy(predictions):
    losses = history((None, 3.0), (2.0, 1.7), accuracies=[None, None])
    scores = scores_of(make_run(predictions, history=losses, kept_epoch=1))
    assert (scores["before"], scores["after"]) == (0.5, 0.5)


def test_verdict_on_a_saved_model(predictions):
    assert verdict(scores_of(scored(predictions))) == "Accuracy is 50.0%."
    assert verdict(scores_of({**scored(predictions), "history": []})) == "Accuracy is 50.0%."
    assert verdict(scores_of(scored([]) | {"history": []})) == "Nothing was measured."


def test_warning_that_the_baseline_is_not_beaten():
    data = {**make_run()["data"], "baseline_accuracy": 0.75}
    assert said(data=data)[1][0] == (
        "Training did not beat the baseline: giving each question its most frequent answer scores 75.0%."
    )


def test_warning_that_accuracy_fell():
    losses = history((None, 3.0), (2.0, 1.7), accuracies=[0.9, 0.8])
    assert said(history=losses, kept_epoch=1)[1] == [
        "Accuracy fell from 90.0% to 80.0%: the model answered better before training."
    ]


def test_warning_of_overfitting():
    assert said()[1] == [
        "It overfits after epoch 2: by the last epoch, validation loss rose from 1.5000 to 1.9000 while training loss "
        "fell from 1.0000 to 0.5000."
    ]


def test_no_warning_without_a_reason():
    losses = history((None, 3.0), (2.0, 1.7), (1.0, 1.5), accuracies=[0.25, 0.5, 0.75])
    assert said(history=losses)[1] == []


def test_page_of_a_run(open_page, predictions):
    data = {**make_run()["data"], "warnings": ["2 pictures stand in both files"]}
    page = open_page(make_run(predictions, data=data))
    text = page.find_element(By.TAG_NAME, "main").text
    for words in (
        "Accuracy rose from 25.0% to 75.0%.",
        "Epoch 2 of 3 was the best",
        "without a look at the picture, scores 40.0%",
        "It overfits after epoch 2",
        "2 pictures stand in both files",
        "5 (train.jsonl:7, train.jsonl:8, train.jsonl:9, …)",
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
        *("Expected", "Two cars.", "Before", "✓ right", "Two cars.", "After", "✗ wrong", "Three cars.")
    ]


def test_charts_are_named_and_have_every_line(open_page, predictions):
    page = open_page(make_run(predictions))
    charts = page.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    assert [chart.accessible_name.split(" A line")[0] for chart in charts] == ["Loss by epoch", "Accuracy by epoch"]
    labels = [{text.text for text in chart.find_elements(By.TAG_NAME, "text")} for chart in charts]
    assert {"training", "validation", "kept: epoch 2", "epoch"} <= labels[0]
    assert {"validation", "baseline", "kept: epoch 2", "40%"} <= labels[1]
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len(set(ids))


def test_page_of_a_saved_model(open_page, predictions):
    page = open_page(scored(predictions))
    assert shown(page, "h2") == ["Validation pictures", "How it was made"]
    assert chips(page) == ["All 4", "Wrong now 2"]
    assert {text.splitlines()[2] for text in shown(page, ".question dl")} == {"Answer"}


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_losses_that_are_no_numbers(tmp_path, loss):
    write_report(tmp_path / "report.html", make_run(history=history((None, loss), (loss, loss)), kept_epoch=1))
    assert "<svg" in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def thumbnails(path):
    encoded = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', path.read_text())
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in encoded]


def test_one_small_thumbnail_for_each_picture_that_can_be_read(tmp_path, predictions):
    write_report(tmp_path / "report.html", make_run(predictions))
    assert [image.size for image in thumbnails(tmp_path / "report.html")] == [(320, 213)]


def test_thumbnails_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.new("RGB", (60, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    turned = prediction(tmp_path / "turned.jpg", 1, "Is it red?", "Yes.", None, "Yes.")
    write_report(tmp_path / "report.html", make_run([turned]))
    assert [image.size for image in thumbnails(tmp_path / "report.html")] == [(20, 60)]


def test_placeholder_for_a_picture_that_is_gone_or_broken(open_page, predictions):
    page = open_page(make_run(predictions))
    assert shown(page, ".missing") == ["The picture is gone or can’t be read."] * 2
    assert page.execute_script("return [...document.images].every(image => image.complete && image.naturalWidth)")


def test_pictures_beyond_the_cap_are_the_uneventful_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_PICTURES", 3)
    answers = [("Yes.", "Yes."), ("Yes.", "Yes."), ("Yes.", "No."), ("No.", "Yes."), ("No.", "No."), ("Yes.", "Yes.")]
    cases = [prediction(tmp_path / f"{i}.jpg", i, "Is it?", "Yes.", *pair) for i, pair in enumerate(answers)]
    write_report(tmp_path / "report.html", make_run(cases))
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"text\">images/(\d).jpg", page) == ["2", "3", "4"]
    assert "3 of 6 pictures are left out" in page


# ---------------------------------------------------------------------------------------------------------------------
# In the browser
# ---------------------------------------------------------------------------------------------------------------------


def test_filters(open_page, predictions):
    page = open_page(make_run(predictions))
    assert chips(page) == ["All 4", "Wrong now 2", "Newly right 1", "Newly wrong 1"]
    expected = {
        "All": ["valid.jsonl:1", "valid.jsonl:2", "valid.jsonl:4", "valid.jsonl:3"],
        "Wrong now": ["valid.jsonl:2", "valid.jsonl:4"],
        "Newly right": ["valid.jsonl:1"],
        "Newly wrong": ["valid.jsonl:2"],
    }
    for chip in page.find_elements(By.CLASS_NAME, "chip"):
        chip.click()
        assert shown(page, ".place") == expected[chip.text.rsplit(maxsplit=1)[0].strip()]
    assert shown(page, ".file") == ["images/whole.jpg"]
    assert shown(page, "#shown") == ["1 question on 1 picture"]


def test_filters_by_keyboard(open_page, predictions):
    page = open_page(make_run(predictions))
    page.execute_script("document.querySelector('[type=radio]').focus()")
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert shown(page, ".place") == ["valid.jsonl:2", "valid.jsonl:4"]
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys("RAIN" + Keys.ENTER)
    assert shown(page, ".place") == ["valid.jsonl:4"]


@pytest.mark.parametrize(
    ("words", "places"),
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
def test_search(open_page, predictions, words, places):
    page = open_page(make_run(predictions))
    page.find_element(By.CSS_SELECTOR, "[type=search]").send_keys(words)
    assert shown(page, ".place") == [f"valid.jsonl:{place}" for place in places]
    assert chips(page)[0] == f"All {len(places)}"
    assert ("No question matches." in shown(page, "#shown")) == (not places)


def test_everything_from_the_data_is_text(open_page, tmp_path):
    evil = {**prediction(tmp_path / "x.jpg", 1, EVIL, EVIL, EVIL, EVIL), "image_path": EVIL, "place": EVIL}
    file = {**facts(EVIL), "answers": [[EVIL, 4]], "skipped": {EVIL: {"count": 1, "places": [EVIL]}}}
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    page = open_page(
        make_run(
            [evil],
            title=EVIL,
            model={"id": EVIL, "revision": EVIL},
            data={"train": file, "valid": file, "baseline_accuracy": 0.1, "warnings": [EVIL]},
            constants={EVIL: EVIL},
            machine={EVIL: EVIL},
        )
    )
    assert shown(page, ".ask") == [EVIL]
    assert page.find_element(By.CSS_SELECTOR, ".card img").get_attribute("alt") == EVIL
    assert page.title == f"{EVIL}: report"
    assert page.execute_script("return [document.scripts.length, document.images.length, window.evil]") == [1, 1, None]
    assert page.find_element(By.TAG_NAME, "main").text.count(EVIL) == 22


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overflows_sideways(open_page, tmp_path, width):
    long = "x" * 400
    wide = prediction(tmp_path / "x.jpg", 1, long, long, long, long) | {"image_path": long, "place": long}
    file = {**facts(long), "answers": [[long, 4]], "skipped": {long: {"count": 1, "places": [long]}}}
    data = {"train": file, "valid": file, "baseline_accuracy": 0.1, "warnings": [long]}
    page = open_page(make_run([wide], title=long, data=data, constants={long: long}, machine={long: long}), width)
    width_of = "return document.documentElement"
    assert page.execute_script(f"{width_of}.scrollWidth") == page.execute_script(f"{width_of}.clientWidth")
    page.execute_script("document.querySelector('.card').scrollIntoView()")
    sticks_out = """return [...document.querySelectorAll('main *')].filter(each => !each.closest('svg, .scroll')
        && each.getBoundingClientRect().right > innerWidth).map(each => each.outerHTML.slice(0, 80))"""
    assert page.execute_script(sticks_out) == []


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(open_page, predictions, scheme):
    page = open_page(make_run(predictions), scheme=scheme)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    background = luminance(page.execute_script(style, ".panel", "backgroundColor"))
    assert (background < 0.1) == (scheme == "dark")
    texts = [(each, "color") for each in ("h1", ".muted", ".place", ".mark.right", ".mark.wrong", ".kept td")]
    for selector, kind in [*texts, ("svg text", "fill")]:
        dark, light = sorted([background, luminance(page.execute_script(style, selector, kind))])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector


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
