"""The page on which a saved model is asked: over HTTP, in headless Chromium, and from the shell."""

import base64
import io
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
import uvicorn
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from transformers import AutoModelForCausalLM

from moondream2 import ask, serve
from moondream2.charts import PALETTE
from moondream2.cli import InputError
from moondream2.modeling_moondream2 import Answer
from moondream2.pictures import CUT, SCALED, set_up_pillow
from moondream2.verdict import sureness
from tests.shared import ROOT, TINY, small_tokenizer

EVIL = "</script><script>window.evil = 1</script>\"'><img src=nothing onerror='window.evil = 1'>{{ 7 * 7 }}"
QUESTIONS = [
    "Is there a crossing?",
    "How many cars are there?",
    "What colour is the signal?",
    EVIL,
    "  信号は\n何色 🚦? ",
]
PHOTO = ROOT / "images" / "valid_001.jpg"
MOST_BYTES = 2**20  # of a picture's file, in place of 256 MiB


class Served:
    """The page, served by a thread, and the model behind it, with how often its vision encoder has run."""

    def __init__(self, model):
        self.model, self.encoded = model, 0
        model.vision_encoder.register_forward_hook(self.count)
        self.asked, self.socket = serve.Asked(model, small_tokenizer()), serve.listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.pool = ThreadPoolExecutor(1)
        app = serve.build_app(self.asked, EVIL, "127.0.0.1", self.pool)
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def count(self, *arguments):
        self.encoded += 1

    def end(self):
        self.server.should_exit = True
        self.thread.join()
        self.pool.shutdown()

    def post(self, path, body, **headers):
        """(HTTP's number, what was answered)."""
        request = Request(self.url + path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        try:
            with urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except HTTPError as error:
            return error.status, json.load(error)

    def look(self, content):
        status, said = self.post("picture", content)
        assert status == 200, said
        return said["picture"], said["remarks"]

    def ask(self, picture, question):
        return self.post("ask", json.dumps({"picture": picture, "question": question}).encode())

    def answers(self):
        return self.ask(self.look(PHOTO.read_bytes())[0], "Is there a crossing?")[0] == 200

    def right(self, picture, question):
        """What is to be answered, of the model asked without a server."""
        features = self.model.encode_image(picture)
        ((answer,),) = self.model.answer_questions(features, [[question]], small_tokenizer(), return_probabilities=True)
        return 200, {"answer": answer.text, "sure": sureness(answer.probability), "is_cut": answer.is_cut}


@pytest.fixture(scope="module")
def served():
    set_up_pillow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "MOST_BYTES", MOST_BYTES)
        made = Served(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval())
        yield made
        made.end()


def saved(image, kind, **settings):
    image.save(file := io.BytesIO(), kind, **settings)
    return file.getvalue()


def turned():
    """A JPEG that is to be turned upright by its EXIF orientation."""
    image = Image.open(PHOTO)
    image.getexif()[0x0112] = 6
    return saved(image, "JPEG", exif=image.getexif())


PICTURES = {
    "a photo": (PHOTO.read_bytes(), []),
    "on its side": (turned(), []),
    "transparent": (saved(Image.open(PHOTO).convert("RGBA").rotate(30), "PNG"), []),
    "16 bits": (saved(Image.open(PHOTO).convert("L").convert("I;16"), "PNG"), [SCALED]),
    "without its last bytes": (PHOTO.read_bytes()[:-40], [CUT]),
}


# ---------------------------------------------------------------------------------------------------------------------
# Over HTTP
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "remarks"), PICTURES.values(), ids=PICTURES)
def test_answers_are_the_models_own(served, content, remarks):
    picture, said = served.look(content)
    assert said == remarks
    whole = Image.open(io.BytesIO(content + b"\xff\xd9"))
    for question in QUESTIONS:
        assert served.ask(picture, question) == served.right(whole, question)


def test_many_questions_encode_a_picture_once(served):
    before = served.encoded
    picture, _ = served.look(PHOTO.read_bytes())
    assert len({served.ask(picture, question)[1]["answer"] for question in QUESTIONS}) > 1
    assert served.encoded == before + 1


def test_two_people_do_not_mix(served):
    """They ask at the same moments, the one the other's questions, about pictures that are answered differently."""
    images = [Image.open(ROOT / "images" / f"valid_00{number}.jpg") for number in (1, 2)]
    right = [[served.right(image, question) for question in QUESTIONS] for image in images]
    assert right[0] != right[1]
    start = threading.Barrier(2)

    def person(image):
        start.wait()
        picture, _ = served.look(saved(image, "PNG"))
        return [served.ask(picture, question) for question in QUESTIONS]

    with ThreadPoolExecutor(2) as people:
        assert list(people.map(person, images)) == right


def huge():
    """A PNG whose header tells of more pixels than are decoded; there are none in it."""
    content = bytearray(saved(Image.new("1", (10, 10)), "PNG"))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


BROKEN = {
    "a text": (b"Is this a picture?\n" * 9, "This is no picture, or in a format that Pillow does not read."),
    "nothing": (b"", "This is no picture, or in a format that Pillow does not read."),
    "half a JPEG": (PHOTO.read_bytes()[:9000], "Picture broken: the file ends early: "),
    "half a PNG": (saved(Image.open(PHOTO), "PNG")[:9000], "Picture broken: OSError: "),
    "too many pixels": (huge(), "Picture too large: 20000 x 20000 pixels are more than 89,478,485."),
    "too many bytes": (bytes(MOST_BYTES + 1), "Picture too large: its file has more than 1 MiB."),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_picture_gets_a_clear_word(served, content, words):
    before = served.encoded
    status, said = served.post("picture", content)
    assert status in (413, 422) and said["error"].startswith(words) and "\n" not in said["error"]
    assert served.encoded == before and served.answers()


def test_a_question_that_can_not_be_asked_gets_a_clear_word(served):
    picture, _ = served.look(PHOTO.read_bytes())
    for question in ("", " \n\t "):
        assert served.ask(picture, question) == (422, {"error": "There is no question yet."})
    most, words = 2048 - 1 - 81 - 16, len(small_tokenizer()("\n\nQuestion: a\n\nAnswer:").input_ids) - 1
    assert served.ask(picture, "a " * 3000)[1]["error"] == (
        f"The question is too long: it makes {3001 + words:,} tokens, and {most:,} fit."
    )
    assert served.ask(picture, "?" * 2**20) == (413, {"error": "The question is too long."})
    assert served.ask("nobody's", "Why?") == (404, {"error": "The picture is not known any more."})
    for content in (b"", b"[1]", b'{"picture": "x"}', b"\xff", b"[" * 100_000):
        assert served.post("ask", content)[0] == 400
    assert served.ask(picture, "Half a \ud83d?") == served.right(Image.open(PHOTO), "Half a ??")
    assert served.answers()


@pytest.mark.slow
def test_the_longest_question_leaves_room_for_an_answer(served):
    picture, _ = served.look(PHOTO.read_bytes())
    most, tokenizer = 2048 - 1 - 81 - 16, small_tokenizer()
    words = len(tokenizer("\n\nQuestion: a\n\nAnswer:").input_ids) - 1
    longest = "a" + " a" * (most - words - 1)
    assert len(tokenizer(f"\n\nQuestion: {longest}\n\nAnswer:").input_ids) == most
    status, said = served.ask(picture, longest)
    assert (status, said) == served.right(Image.open(PHOTO), longest) and said["answer"]
    assert served.ask(picture, longest + " a")[0] == 422


def test_the_pictures_that_were_asked_about_last_are_known(served):
    first, second = (served.look(PHOTO.read_bytes())[0] for _ in range(2))
    for _ in range(serve.MOST_PICTURES - 2):
        served.look(PHOTO.read_bytes())
    assert served.ask(first, "Why?")[0] == 200  # and by that is not the oldest any more
    served.look(PHOTO.read_bytes())
    assert (served.ask(first, "Why?")[0], served.ask(second, "Why?")[0]) == (200, 404)
    assert len(served.asked.embeds) == serve.MOST_PICTURES


def test_pages_of_other_sites_can_not_ask(served):
    for path in ("picture", "ask"):
        said = served.post(path, PHOTO.read_bytes(), Sec_Fetch_Site="cross-site")
        assert said == (403, {"error": "Only the page of this server may ask."})
    with pytest.raises(HTTPError) as error:  # a site that gives its own name this computer's address
        urlopen(Request(served.url, headers={"Host": "evil.example"}))
    assert error.value.status == 400


def test_a_model_that_fails_is_told_and_the_server_goes_on(served, monkeypatch, caplog):
    picture, _ = served.look(PHOTO.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(served.model, "answer_questions", lambda *_, **__: 1 / 0)
        assert served.ask(picture, "Why?") == (
            500,
            {"error": "The model failed. The terminal in which it runs says why."},
        )
    assert served.answers()
    assert "ZeroDivisionError" in caplog.text


def test_nothing_is_written(served):
    """Not even a file that is removed again. A large picture is what a form would put into one."""
    large = saved(Image.effect_noise((900, 900), 90), "PNG")
    assert len(large) > 500_000
    with writes() as written:
        picture, _ = served.look(large)
        for question in QUESTIONS:
            served.ask(picture, question)
        served.post("picture", large[:9000])
        served.ask(picture, "")
    assert written == []


WRITTEN = []  # a list while files that are written are noted


@contextmanager
def writes():
    """Gives a list, to which each file is added that any thread opens for writing."""
    if not WRITTEN:
        sys.addaudithook(note)  # which can't be removed
    WRITTEN.append([])
    yield WRITTEN[-1]
    WRITTEN.append(None)


def note(event, arguments):
    if event == "open" and WRITTEN[-1] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        WRITTEN[-1].append(arguments[0])


def test_the_files_that_are_written_are_noted(tmp_path):
    """Else the test above would see nothing."""
    with writes() as written, tempfile.TemporaryFile(dir=tmp_path):
        (tmp_path / "kept").touch()
    (tmp_path / "later").touch()
    assert {*written} == {str(tmp_path), str(tmp_path / "kept")}


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------


class Page:
    """The page in headless Chromium."""

    def __init__(self, driver):
        self.driver = driver

    def all(self, selector):
        """The texts of what is shown, all of one moment."""
        return self.driver.execute_script(
            """return [...document.querySelectorAll(arguments[0])].filter(each => each.checkVisibility())
            .map(each => each.innerText.trim());""",
            selector,
        )

    def wait(self, selector, count=1):
        """The texts that a selector shows, once there are so many and none is still to come."""
        WebDriverWait(self.driver, 20, 0.02).until(
            lambda _: len(self.all(selector)) == count and not {"…", "Looking at the picture…"} & {*self.all("p")}
        )
        return self.all(selector)

    def choose(self, path):
        self.driver.find_element(By.ID, "file").send_keys(str(path))

    def hand(self, event, content, name="picture.png"):
        """Drops or pastes a file."""
        self.driver.execute_script(
            """const [event, content, name] = arguments, data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
            const settings = {bubbles: true, cancelable: true};
            document.body.dispatchEvent(event === "paste"
                ? new ClipboardEvent(event, {...settings, clipboardData: data})
                : new DragEvent(event, {...settings, dataTransfer: data}));""",
            event,
            base64.b64encode(content).decode(),
            name,
        )

    def ask(self, question, key=None):
        box = self.driver.find_element(By.ID, "question")
        box.clear()
        box.send_keys(question, *([key] if key else []))
        if not key:
            self.driver.find_element(By.TAG_NAME, "button").click()


@pytest.fixture
def page(driver, served):
    """Whatever a test does on it, it must ask for nothing but itself and log no error but those of broken pictures."""
    driver.get("data:,")  # the last of what is logged before this test
    driver.get_log("performance"), driver.get_log("browser")
    driver.get(served.url)
    yield Page(driver)
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    asked = {url for url in asked if not url.startswith(("data:", "blob:"))}
    assert served.url in asked and asked <= {served.url, f"{served.url}picture", f"{served.url}ask"}
    assert driver.execute_script("return window.evil") is None
    logged = [each["message"] for each in driver.get_log("browser")]
    assert [
        line for line in logged if "Failed to load resource: the server responded with a status of 4" not in line
    ] == []


def shown(right):
    """An answer as it stands on the page."""
    return right[1]["answer"], f"{right[1]['sure']} sure"


def test_a_picture_a_question_and_an_answer(page, served):
    before = served.encoded
    page.choose(PHOTO)
    for number, question in enumerate(QUESTIONS[:3], start=1):
        page.ask(question, Keys.ENTER if number == 2 else None)
        page.wait("#answers li", number)
    newest_first = [shown(served.right(Image.open(PHOTO), question)) for question in QUESTIONS[2::-1]]
    assert page.all("#answers .question") == QUESTIONS[2::-1]
    assert [*zip(page.all("#answers .answer"), page.all("#answers .sure"), strict=True)] == newest_first
    assert served.encoded == before + 1 + 3  # three of them for what is right
    assert page.driver.execute_script("return [preview.naturalWidth, question.value, document.title]") == [
        Image.open(PHOTO).width,
        "",
        EVIL,
    ]


@pytest.mark.slow
def test_words_of_the_person_and_the_model_are_text(page, served, monkeypatch):
    monkeypatch.setattr(served.model, "answer_questions", lambda *_, **__: [[Answer(EVIL, 0.5, is_cut=True)]])
    page.hand("drop", PHOTO.read_bytes(), EVIL)
    page.ask(EVIL)
    page.wait("#answers .answer")
    assert page.all("h1, #answers p") == [EVIL, EVIL, EVIL, "50% sure, of what there is: it was cut off"]


def test_the_browser_lets_the_page_ask_for_nothing_else(driver, served):
    driver.get(served.url)
    blocked = driver.execute_async_script(
        """const [elsewhere, done] = arguments, blocked = [];
        addEventListener("securitypolicyviolation", event => blocked.push(event.effectiveDirective));
        const add = (name, settings) => document.body.append(Object.assign(document.createElement(name), settings));
        add("img", {src: elsewhere});
        add("script", {src: elsewhere});
        add("script", {textContent: "window.evil = 1"});
        add("link", {rel: "stylesheet", href: elsewhere});
        add("iframe", {src: elsewhere});
        new FontFace("font", `url(${elsewhere})`).load().catch(() => {});
        navigator.sendBeacon(elsewhere);
        fetch(elsewhere).catch(() => {}).then(() => setTimeout(() => done(blocked), 50));""",
        served.url.replace("127.0.0.1", "localhost"),
    )
    kinds = {"img-src", "script-src-elem", "style-src-elem", "frame-src", "font-src", "connect-src"}
    assert {*blocked} == kinds and len(blocked) == len(kinds) + 2
    assert driver.execute_script("return window.evil") is None


@pytest.mark.slow
def test_what_comes_late_of_a_picture_before_is_left_out(page, served, monkeypatch):
    """That it is broken, and what it was asked."""
    go_on, decoded = threading.Event(), serve.decoded
    monkeypatch.setattr(serve, "decoded", lambda content: (go_on.wait(20), decoded(content))[1])
    for content in (b"no picture", PHOTO.read_bytes()):
        go_on.clear()
        page.hand("drop", content)
        page.ask("What is late?")
        page.hand("drop", PICTURES["16 bits"][0])
        page.ask("Why?")
        go_on.set()
        page.wait("#answers .answer")
        assert page.all("#answers .question") == ["Why?"] and page.all(".notice") == [SCALED]


def test_pictures_are_dropped_and_pasted(page, served):
    images = [Image.open(ROOT / "images" / f"valid_00{number}.jpg") for number in (1, 2)]
    for event, image in zip(("drop", "paste"), images, strict=True):
        page.hand(event, saved(image, "PNG"))
        page.ask(QUESTIONS[0])
        page.wait("#answers .answer", 1)  # what was asked about the picture before is gone
        right = shown(served.right(image, QUESTIONS[0]))
        assert (*page.all("#answers .answer"), *page.all("#answers .sure")) == right


@pytest.mark.parametrize(
    "kind", ["half a PNG", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("a text", "too many bytes"))]
)
def test_a_broken_picture_gets_a_clear_word_on_the_page(page, kind):
    content, words = BROKEN[kind]
    page.hand("drop", content)
    (said,) = page.wait("#said .notice")
    assert said.startswith(words) and page.all("#preview") == []
    page.ask("Why?")
    assert page.wait("#problem .notice") == ["Choose a picture first."]
    page.hand("drop", PHOTO.read_bytes())
    page.ask("Why?")
    page.wait("#answers .answer")
    assert page.all(".notice") == []


@pytest.mark.slow
def test_remarks_and_questions_that_can_not_be_asked_stand_on_the_page(page):
    page.hand("drop", PICTURES["16 bits"][0])
    assert page.wait("#said .notice") == [SCALED]
    page.ask("")
    assert page.wait("#problem .notice") == ["There is no question yet."]
    page.driver.execute_script("question.value = arguments[0]", "a " * 3000)
    page.driver.find_element(By.TAG_NAME, "button").click()
    WebDriverWait(page.driver, 20, 0.02).until(lambda _: "too long" in page.all("#problem")[0])
    assert page.all("#answers li") == [] and len(page.driver.execute_script("return question.value")) == 6000


@pytest.mark.slow
def test_a_picture_that_the_browser_can_not_show_is_asked_about_all_the_same(page):
    page.hand("drop", saved(Image.open(PHOTO).resize((300, 200)), "TIFF"), "scan.tif")
    page.ask("Why?")
    page.wait("#answers .answer")
    assert page.all("#drop") == ["scan.tif: the browser can't show it, the model sees it"]


@pytest.mark.slow
def test_a_picture_that_the_server_has_forgotten_is_sent_again(page, served):
    page.choose(PHOTO)
    page.ask("Why?")
    page.wait("#answers .answer", 1)
    served.asked.embeds.clear()
    page.ask("Why?")
    page.wait("#answers .answer", 2)
    first, second = page.all("#answers .answer")
    assert first == second


@pytest.mark.slow
def test_a_server_that_has_ended_is_told_as_such(page, driver):
    page.choose(PHOTO)
    page.ask("Why?")
    page.wait("#answers .answer", 1)
    driver.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.ask("Who?")
    assert page.wait("#problem .notice") == ["The server does not answer. Does it still run?"]
    assert driver.execute_script("return question.value") == "Who?"


@pytest.mark.slow
def test_it_fits_a_narrow_screen_in_light_and_dark(page, driver):
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.choose(PHOTO)
    page.ask("W" * 200)
    page.wait("#answers .answer")
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    for scheme in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colour = "rgb({}, {}, {})".format(*bytes.fromhex(PALETTE[scheme]["page"][1:]))
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == colour


# ---------------------------------------------------------------------------------------------------------------------
# From the shell
# ---------------------------------------------------------------------------------------------------------------------


def run_ask(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ask.py", *map(str, words)])
    ask.main()


def request(url, body=None):
    with urlopen(Request(url, body), timeout=60) as answer:
        return answer.read()


def test_it_says_where_it_is_and_ends_by_ctrl_c(monkeypatch, capfd):
    """And says nothing of what it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"

    def visit_and_end():
        try:
            for _ in range(600):
                with suppress(OSError):
                    page = request(url)
                    picture = json.loads(request(f"{url}picture", PHOTO.read_bytes()))["picture"]
                    asked = json.dumps({"picture": picture, "question": "Why?"}).encode()
                    return page, request(f"{url}ask", asked)
                time.sleep(0.05)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as thread:
        visit = thread.submit(visit_and_end)
        try:
            run_ask(monkeypatch, TINY, "--serve", "--port", port)
        except KeyboardInterrupt:  # which would end all tests
            pytest.fail("ctrl-C ends it with a traceback")
    page, answer = visit.result()
    assert b"<title>tiny_moondream2</title>" in page and b'"sure"' in answer
    printed = capfd.readouterr()
    assert printed.out.splitlines() == [
        f"tiny_moondream2 answers on http://127.0.0.1:{port} (ctrl-C ends it)",
        "Stopped: nothing of the pictures and questions is kept",
    ]
    assert [line for line in printed.err.splitlines() if line and "Loading weights" not in line] == []


def never_loaded():
    pytest.fail("the model was loaded first")


def test_a_port_that_is_taken_is_told_as_such(served):
    port = served.socket.getsockname()[1]
    with pytest.raises(InputError, match=f"^port {port} of 127.0.0.1 is taken: give another --port$"):
        serve.serve(never_loaded, "model", "127.0.0.1", port)
    for host, port in (("127.0.0.1", 70_000), ("203.0.113.9", 0)):
        with pytest.raises(InputError, match=rf"^cannot listen on port {port} of {host}: [^\n]+$"):
            serve.serve(never_loaded, "model", host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::"])
def test_who_else_can_ask_is_said(monkeypatch, capsys, host):
    seen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append((self.config.app, *sockets)))
    serve.serve(lambda: (None, None), "model", host, 0)
    printed, is_local = capsys.readouterr(), host in ("127.0.0.1", "localhost")
    warning = f"warning: whoever reaches {host} can ask this model, and nothing is encrypted\n"
    assert printed.err == ("" if is_local else warning)
    assert f"answers on http://{f'[{host}]' if ':' in host else host}:" in printed.out


def test_this_computer_alone_by_itself(monkeypatch):
    """Nobody has to say so."""
    told = []
    monkeypatch.setattr(ask, "serve", lambda load, *rest: told.extend(rest))
    run_ask(monkeypatch, TINY, "--serve")
    assert told == ["tiny_moondream2", "127.0.0.1", 7860]


def test_what_is_typed_beside_it_is_refused(monkeypatch):
    for words in ([PHOTO, "Why?"], ["valid.jsonl"], ["--against", TINY]):
        with pytest.raises(InputError, match="--serve takes a model alone: pictures and questions come from its page"):
            run_ask(monkeypatch, TINY, *words, "--serve")


def test_without_its_libraries_a_line_says_which(monkeypatch):
    monkeypatch.setattr(serve, "uvicorn", None)
    with pytest.raises(InputError, match="does without: pip install starlette==[0-9.]+ uvicorn==[0-9.]+$"):
        serve.serve(never_loaded, "model", "127.0.0.1", 0)
    assert {*serve.PACKAGES.split()} <= {*(ROOT / "tests" / "requirements.txt").read_text().splitlines()}
    assert f"    pip install {serve.PACKAGES}\n" in (ROOT / "docs" / "serving.md").read_text()
