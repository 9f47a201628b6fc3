"""What the tests share: the small checkpoint, small data, and ways to run the script."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

try:
    import pytest
except ModuleNotFoundError:
    sys.exit("error: the programs of tests/ need more than training does: pip install -r tests/requirements.txt")
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finetune_moondream as script
from moondream2 import cli, optimizer
from moondream2.data import read_lines
from moondream2.features import FeatureStore
from moondream2.modeling_moondream2 import lay_out_rows
from moondream2.optimizer import build_optimizer, build_scheduler
from moondream2.pictures import KnownPictures, find_pictures
from moondream2.rows import lay_out
from tests.child import leave_undrawn, leave_unflushed

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_moondream2"
TINY_2025 = ROOT / "tests" / "tiny_moondream2_2025"
both_releases = pytest.mark.parametrize("small_model", [TINY, TINY_2025], ids=["2024", "2025"], indirect=True)
QUESTIONS = ["What is it?", "How many white boxes are there?", "Is it safe to cross here?", "Why?"]
ANSWERS = ["A box.", "One.", "Yes, the road is clear and the light is green.", "Nobody knows."]
CHROMIUM_OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage
    --disable-background-networking --disable-component-update --disable-sync"""


def pytest_configure(config):
    """A model of 2 million parameters is slower on all cores than on one, and tests start several processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTEST_ADDOPTS", None)  # what a test starts pytest with is its own
    paths = str(ROOT / "tests" / "starts"), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    torch.set_num_threads(1)
    os.fsync = leave_unflushed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell starts with & ignores


@pytest.fixture(scope="module")
def all_cores():
    """For models of full size: what other tests run beside them leave of the cores."""
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    yield
    torch.set_num_threads(1)


@pytest.fixture
def small_model(request):
    """The folder of the small checkpoint, for `both_releases` of each release; of the `smallest` where so marked."""
    folder = getattr(request, "param", TINY)
    return request.getfixturevalue("smallest")[folder] if request.node.get_closest_marker("smallest") else folder


@pytest.fixture(scope="session")
def smallest(tmp_path_factory):
    """{folder of a small checkpoint: that of a smaller one, of the same release}, which knows little and is quick."""
    folder, text = tmp_path_factory.mktemp("smallest"), {"hidden_size": 64, "intermediate_size": 256}
    vision = {"hidden_size": 32, "intermediate_size": 64, "projection_size": 64, "num_hidden_layers": 1}
    for base in (TINY, TINY_2025):
        config = AutoConfig.from_pretrained(base)
        for part, sizes in ((config.text_config, text), (config.vision_config, vision)):
            part.update({**sizes, "num_attention_heads": 2})
        torch.manual_seed(0)
        model, tokenizer = AutoModelForCausalLM.from_config(config).float(), small_tokenizer(base)
        teach(model, tokenizer)
        for each in (model.bfloat16(), tokenizer):
            each.save_pretrained(folder / base.name)
    return {base: folder / base.name for base in (TINY, TINY_2025)}


def teach(model, tokenizer):
    """Has a model answer the questions of `data`, some rightly: one that knows nothing would talk without end."""
    answers = [f"{ANSWERS[k]} {(k + 1) % 4}" for k in range(4)]
    texts = [
        [(plain_prompt(question, tokenizer), plain_answer(answer, tokenizer))]
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    rows = lay_out_rows(texts, tokenizer.bos_token_id, 0)
    inputs = {name: rows[name] for name in ("input_ids", "position_ids", "answer_positions")}
    targets = torch.tensor([token for ((_, answer),) in texts for token in answer])
    adamw = torch.optim.AdamW(model.text_model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model.text_model(**inputs).logits, targets)
        loss.backward()
        adamw.step()
        adamw.zero_grad()


@pytest.fixture
def tokenizer(small_model):
    return small_tokenizer(small_model)


@pytest.fixture
def tiny(small_model):
    """The small checkpoint in float32, in which equalities can be tested as such."""
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()


def untimed(record):
    """A record of the log without what no two runs have alike."""
    timed = {"seconds", "questions_per_second", "tokens_per_second", "seconds_left"}
    return {name: value for name, value in record.items() if name not in timed}


def plain_prompt(question, tokenizer):
    """The token ids between a picture and an answer, written out for the release that the tokenizer is of."""
    if tokenizer.convert_ids_to_tokens(3) == "<|md_reserved_2|>":
        query, question = (tokenizer(text, split_special_tokens=True).input_ids for text in ("query", question))
        return [1, *query, 2, *question, 3, 3]
    return tokenizer(f"\n\nQuestion: {question}\n\nAnswer:", add_special_tokens=False).input_ids


def plain_answer(answer, tokenizer):
    """The token ids of an answer and its end, written out likewise."""
    space = "" if tokenizer.convert_ids_to_tokens(3) == "<|md_reserved_2|>" else " "
    return [*tokenizer(f"{space}{answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def plain_mask(model, tokens):
    """Who sees whom in a row of one question: (1, 1, tokens, tokens), of which the text model takes all as it is."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if model.config.architectures == ["HfMoondream"]:
        prefix = 1 + model.config.image_tokens
        mask[:prefix, :prefix] = True
    return mask[None, None]


def draw_picture(path, number, size=(140, 100)):
    """A picture that no other number gives."""
    image = Image.new("RGB", size, (40 * number % 256, 90, 255 - 25 * number % 256))
    ImageDraw.Draw(image).rectangle([5 + number, 10, 30 + 3 * number, 50], fill="white")
    image.save(path)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    """A folder with train.jsonl (8 pictures, 1 to 4 questions each, 19 lines) and valid.jsonl (3 pictures, 7 lines)."""
    lines = {"train": [], "valid": []}
    for number, count in enumerate([1, 4, 2, 3, 1, 4, 3, 1, 2, 4, 1]):
        split = "train" if number < 8 else "valid"
        name = f"{number}.png"
        draw_picture(tmp_path / name, number, (140, 100) if number % 3 else (560, 420))
        for k in range(count):
            answer = f"{ANSWERS[k]} {number % 4}"
            lines[split].append({"image_path": name, "question": QUESTIONS[k], "answer": answer})
    for split, each in lines.items():
        write_lines(tmp_path / f"{split}.jsonl", each)
    return tmp_path


@pytest.fixture
def test_file(data):
    """test.jsonl in that folder: 2 other pictures, 5 lines."""
    lines = []
    for number, questions in ((11, 2), (12, 3)):
        draw_picture(data / f"{number}.png", number)
        lines += [
            {"image_path": f"{number}.png", "question": f"What is it? ({k})", "answer": f"A box. {number}"}
            for k in range(questions)
        ]
    return write_lines(data / "test.jsonl", lines)


@cache
def small_tokenizer(small_model=TINY):
    return AutoTokenizer.from_pretrained(small_model)


@cache
def small_config(small_model=TINY):
    return AutoConfig.from_pretrained(small_model)


def dataset(path, tokenizer=None, config=None):
    """The VQADataset of a file, as of the release that the tokenizer is of."""
    tokenizer = tokenizer or small_tokenizer()
    config = config or small_config(Path(tokenizer.name_or_path))
    lines = read_lines(path, tokenizer.eos_token)
    return script.VQADataset(path, lines, find_pictures(path, lines, KnownPictures(None)), config, tokenizer)


def layer_out(model, tokenizer, *datasets, folder=None):
    """`lay_out` for examples of these datasets, as the script fills it in; `folder` keeps features."""
    pictures = {key: picture for dataset in datasets for key, picture in dataset.pictures.items()}
    tokens = {"bos": tokenizer.bos_token_id, "image_tokens": model.config.image_tokens}
    return partial(lay_out, pictures=pictures, store=FeatureStore(folder, model), **tokens)


def constants(**changes):
    """The script's constants, as `main` hands them down."""
    values = vars(cli.parse(script, []))
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**{**values, **changes})


def engine_of(model, optimizer=None, steps=100, **changes):
    """The script's engine on the CPU, with its own optimizer or another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model.vision_encoder.requires_grad_(False)
    c = constants(**changes)
    optimizer = optimizer or build_optimizer(model.text_model, c.learning_rate, c.weight_decay, c.betas)
    scheduler = build_scheduler(optimizer, c.lr_schedule, c.warmup_steps, steps)
    return script.Engine(Accelerator(cpu=True), model.text_model, optimizer, scheduler)


@pytest.fixture
def as_on_a_card(monkeypatch):
    """AdamW takes the way on a CPU that it takes on a card: the host never knows whether a step is applied."""
    monkeypatch.setattr(optimizer, "is_known", lambda found_inf: False)
    monkeypatch.setattr(optimizer, "update_on", lambda *arguments: optimizer.update_if_finite)


def step_of(engine, batches, vision_encoder, max_grad_norm=1.0):
    """What came of one optimizer step, by the script's own functions."""
    (step,) = script.train_steps(engine, [batches], vision_encoder, max_grad_norm)
    return step


@pytest.fixture
def run_main(monkeypatch):
    """`run_main(epochs=1, ...)` runs the script's `main` in this process with these flags; charts are left undrawn."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def run(**flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["finetune_moondream.py", *words])
        monkeypatch.setattr(Figure, "savefig", leave_undrawn)
        script.main()

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def hub_is(monkeypatch):
    """`hub_is(folder)`: nothing of the hub is found but what lies in this cache of it, as by HF_HOME."""

    def hub_is(folder):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))

    return hub_is


def run_python(code, cwd, **environment):
    """Python code in a process that knows nothing of this project; returns what it printed."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Headless Chromium, which logs what it asks for and what goes wrong on a page."""
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
