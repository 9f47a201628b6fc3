"""The export for llama.cpp: a real engine, llama.cpp's server in a wheel, gives the project's own answers over HTTP."""

import base64
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gguf
import pytest
import torch
import xllamacpp
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from moondream2 import export_gguf
from moondream2.cli import InputError
from moondream2.export_gguf import export
from moondream2.modeling_moondream2 import prompt_text, token_ids
from moondream2.scoring import METRICS
from tests.shared import ROOT, TINY, TINY_2025, small_tokenizer

MARKER = f"<__media_{'a' * 32}__>"  # in the form of the server's own
OLLAMA_MARKER = f"<__ollama_media_{'0' * 32}__>"
QUESTIONS = [
    "Is there a crossing?",
    "Does the sign say \"Stop\" or 'Go'? It's I'LL",
    "Что показывает сигнал? 信号は何色ですか 🚦",
    "a\tb\t\tc   d     e",
    "\r\n first line\nsecond\n\n\n",
    "{{ 1 }} {% if %} <b>&amp;</b> \\n \\u0041",
    "What is <__media_x__>?",
    "<__media__> <__media_x__> are what?",
    f"{MARKER[:-1]} what?",
    f"What is {MARKER}? What is {OLLAMA_MARKER}?",
    "",
]
SIZES = {"small": (100, 60), "the model's own": (126, 126), "wide, seen by us in tiles": (700, 300)}


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


class Engine:
    """llama.cpp's server, serving the GGUF files of a folder on a port of its own."""

    def __init__(self, folder, parallel=1, context=0):
        params = xllamacpp.CommonParams()
        (text_model,) = folder.glob("text-model-*.gguf")
        params.model.path, params.mmproj.path = str(text_model), str(folder / "mmproj-f16.gguf")
        params.port, params.use_jinja, params.warmup = 0, True, False
        params.n_parallel, params.n_ctx = parallel, context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)
        self.url = self.server.listening_address

    def post(self, path, **body):
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request) as response:
                return json.load(response)
        except HTTPError as error:
            return error.read().decode()

    def ask(self, content, **more):
        """The answer to a message, as text, and its tokens' ids and log-probabilities."""
        messages = [{"role": "user", "content": content}]
        more = {"temperature": 0, "max_tokens": 32, "logprobs": True} | more
        (choice,) = self.post("/v1/chat/completions", messages=messages, **more)["choices"]
        tokens = choice["logprobs"]["content"]
        return choice["message"]["content"], [t["id"] for t in tokens], [t["logprob"] for t in tokens]

    def prompt(self, *messages):
        """The prompt that a conversation becomes, "picture" in place of the server's marker."""
        messages = [dict(zip(("role", "content"), each, strict=True)) for each in messages]
        prompt = self.post("/apply-template", messages=messages)
        return re.sub("<__media_[A-Za-z0-9]{32}__>", "picture", prompt["prompt"]) if "prompt" in prompt else prompt

    def token_ids(self, text):
        return self.post("/tokenize", content=text, add_special=False)["tokens"]


def text_part(text):
    return {"type": "text", "text": text}


def picture_part(data):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def png(size):
    """A sample picture, stretched to this size, as the bytes of a PNG."""
    file = io.BytesIO()
    Image.open(ROOT / "images" / "valid_001.jpg").resize(size).save(file, "PNG")
    return file.getvalue()


PICTURE = picture_part(png((126, 126)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{type: folder} of the small checkpoint's export."""
    folders = {kind: tmp_path_factory.mktemp("export") / "gguf" for kind in export_gguf.TYPES}
    for kind, folder in folders.items():
        export(TINY, folder, kind)
    return folders


@pytest.fixture(scope="module")
def engine(exported):
    return Engine(exported["f16"])


@cache
def own_model():
    """The project's own model in float32, which sees every picture in one view as the engine does."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    model.vision_encoder.tile_from = None
    return model


@cache
def own_features(data):
    return own_model().encode_image(Image.open(io.BytesIO(data)))


@cache
def own_answer(data, question, most=32):
    """What `Engine.ask` gives, of the project's own model: log-probabilities by one plain pass over all tokens."""
    model, tokenizer, features = own_model(), small_tokenizer(), own_features(data)
    (prompt,) = token_ids([prompt_text(question)], tokenizer)
    ((ids, _),) = model.generate_ids(features, [[prompt]], tokenizer.bos_token_id, tokenizer.eos_token_id, most)[0]
    tokens = torch.tensor([[tokenizer.bos_token_id, *prompt, *ids]])
    with torch.no_grad():
        logits = model(input_ids=tokens, image_embeds=features).logits[0].log_softmax(-1)
    before = logits[-len(ids) - 1 : -1]
    return tokenizer.decode(ids, skip_special_tokens=True), ids, before[range(len(ids)), ids].tolist()


@pytest.mark.parametrize("order", ["picture first", "text first"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_engine_answers_as_the_project_does(engine, size, order):
    data = png(size)
    for question in QUESTIONS:
        content = [picture_part(data), text_part(question)]
        text, ids, logs = engine.ask(content if order == "picture first" else content[::-1])
        own_text, own_ids, own_logs = own_answer(data, question)
        assert (text, ids) == (own_text, own_ids), question
        assert logs == pytest.approx(own_logs, abs=0.005), question


def test_a_model_without_tiles_is_served_as_it_is_asked(exported, tmp_path):
    """Its export is the one that the test above asks, and its own answers are those which that compares with."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["tile_from"] = None
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, tmp_path / "gguf", "f16")
    for name in ("text-model-f16.gguf", "mmproj-f16.gguf"):
        assert (tmp_path / "gguf" / name).read_bytes() == (exported["f16"] / name).read_bytes()
    pages = [(folder / "README.md").read_text() for folder in (tmp_path / "gguf", exported["f16"])]
    assert ["as in training." in page for page in pages] == ["than in training" not in page for page in pages]
    assert "as in training." in pages[0]

    model, tiled = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (folder, TINY))
    large = Image.open(io.BytesIO(png((700, 300))))
    features = model.encode_image(large)
    assert torch.equal(features, own_features(png((700, 300))))
    assert (features - tiled.encode_image(large)).abs().max() > 0.1


def test_answers_differ_from_picture_to_picture_and_from_question_to_question():
    """Else the test above could not tell them apart."""
    answers = [own_answer(png(size), question) for size in SIZES.values() for question in QUESTIONS]
    assert len({tuple(ids) for _, ids, _ in answers}) > 5
    assert len({round(logs[0], 2) for _, _, logs in answers}) > len(QUESTIONS)


@pytest.mark.parametrize(("kind", "near"), [("bf16", 0.02), ("q8_0", 0.2)])
def test_the_engine_reads_every_type(exported, kind, near):
    _, ids, logs = Engine(exported[kind]).ask([PICTURE, text_part("Is there a crossing?")])
    _, own_ids, own_logs = own_answer(png((126, 126)), "Is there a crossing?")
    assert ids == own_ids and logs == pytest.approx(own_logs, abs=near)


def test_as_many_questions_as_the_command_says_are_answered_at_once(exported):
    """They are long enough that four do not fit into 2048 positions, which the server has by itself."""
    command = (exported["f16"] / "README.md").read_text()
    parallel, context = (int(re.search(rf" {flag} (\d+)", command)[1]) for flag in ("-np", "-c"))
    engine = Engine(exported["f16"], parallel, context)
    contents = [[PICTURE, text_part(f"{number} {'zu ' * 400}")] for number in range(parallel)]
    assert len(engine.token_ids(contents[0][1]["text"])) > 1000
    with ThreadPoolExecutor(parallel) as threads:
        answers = list(threads.map(partial(engine.ask, max_tokens=4), contents))
    assert [ids for _, ids, _ in answers] == [engine.ask(content, max_tokens=4)[1] for content in contents]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_line_of_curl_in_the_docs_asks(engine, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```\n(curl .+?)^```$", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S)
    (script,) = [block.replace("http://127.0.0.1:8080", engine.url) for block in blocks if ":8080" in block]
    answer = json.loads(subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout)
    own = own_answer(Path("images/valid_001.jpg").read_bytes(), "Is there a crossing?")[0]
    assert answer["choices"][0]["message"]["content"] == own


def test_nobody_has_to_ask_for_temperature_0(engine):
    with urlopen(f"{engine.url}/props") as response:
        assert json.load(response)["default_generation_settings"]["params"]["temperature"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", [MARKER, OLLAMA_MARKER])
def test_a_marker_within_a_text_is_cut_out_and_put_first(engine, marker):
    """Ollama's server joins the parts of a message itself."""
    fake = "<__media_x__>"
    for content in (f"{marker}Why?", f"Why?{marker}", f"Wh{marker}y?", f"Is {fake}?{marker}", f"Is{marker} {fake}?"):
        question = content.replace(marker, "")
        assert engine.prompt(("user", content)).replace("picture", MARKER) == marker + prompt_text(question)


def test_conversations_become_prompts(engine):
    picture, first = [PICTURE], [PICTURE, text_part("Why?")]
    assert engine.prompt(("user", "Why?")) == prompt_text("Why?")
    assert engine.prompt(("user", first)) == "picture" + prompt_text("Why?")
    assert engine.prompt(("system", "Be kind."), ("user", first)) == "picture" + prompt_text("Why?")
    history = "Question: Why?\n\nAnswer: So.\n\n"
    for before in ([first], [text_part("Why?"), PICTURE]):
        before = before[0] if len(before) == 1 else before
        asked = engine.prompt(("user", before), ("assistant", "So."), ("user", "Who?"))
        assert asked == "picture" + prompt_text("Who?", history)
    assert "Moondream2 sees one picture" in engine.prompt(("user", picture + first))
    assert "Moondream2 sees one picture" in engine.prompt(("user", first), ("assistant", "So."), ("user", first))


def test_token_ids_are_the_projects_own(engine, tmp_path):
    """Also with the release's runs of spaces and tabs, which the small checkpoint's tokenizer lacks."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    runs = [*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1))]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in runs])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] += len(runs) + 3
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name in ("transformer.embd.wte.weight", "lm_head.linear.weight", "lm_head.linear.bias"):
        tensor = weights[f"text_model.{name}"]
        weights[f"text_model.{name}"] = torch.cat([tensor, torch.zeros(len(runs) + 3, *tensor.shape[1:])]).half()
    save_file(weights, folder / "model.safetensors")
    export(folder, tmp_path / "gguf", "f16")
    widened = Engine(tmp_path / "gguf")
    texts = [*QUESTIONS, " " * 40 + "x", "\t" * 12 + " \t  \t\t x", "a  b\n   c\n\n\t\td  ", "\u00a0\u3000 é\u0301 ٣½"]
    for text in map(prompt_text, texts):
        assert engine.token_ids(text) == token_ids([text], small_tokenizer())[0], text
        assert widened.token_ids(text) == token_ids([text], tokenizer)[0], text
    assert max(widened.token_ids(" " * 40)) >= 512


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def stored(path):
    """{name: (type, values as float32)} of a GGUF file."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, torch.tensor(gguf.dequantize(t.data, t.tensor_type))) for t in tensors}


def test_matrices_are_stored_in_the_type_and_the_rest_in_float32(exported):
    source = load_file(TINY / "model.safetensors")["text_model.transformer.h.1.mlp.fc1.weight"].float()
    right = {"f16": source.half().float(), "bf16": source.bfloat16().float()}
    for kind, folder in exported.items():
        tensors = stored(folder / f"text-model-{kind}.gguf")
        types = {name: type_ for name, (type_, _) in tensors.items()}
        assert {types.pop(name) for name in list(types) if name.endswith("bias") or "norm" in name} == {"F32"}
        assert set(types.values()) == {kind.upper()}
        values = tensors["blk.1.ffn_up.weight"][1]
        if kind in right:
            assert torch.equal(values, right[kind])
        else:
            steps = source.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            assert ((values - source).unflatten(1, (-1, 32)).abs() <= 0.6 * steps).all()


def test_the_projection_is_the_sum_of_its_halves(exported):
    left, right = load_file(TINY / "model.safetensors")["vision_encoder.projection.mlp.fc1.weight"].float().chunk(2, 1)
    assert torch.equal(stored(exported["f16"] / "mmproj-f16.gguf")["mm.0.weight"][1], (left + right).half().float())


def test_the_folder_says_how_to_serve_it(exported):
    folder = exported["f16"]
    names = {"text-model-f16.gguf", "mmproj-f16.gguf", "Modelfile", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "Modelfile").read_text().splitlines() == [
        "FROM ./text-model-f16.gguf",
        "FROM ./mmproj-f16.gguf",
        "PARAMETER temperature 0",
        "PARAMETER num_predict 256",
    ]
    page = (folder / "README.md").read_text()
    assert "llama-server --jinja -m text-model-f16.gguf --mmproj mmproj-f16.gguf -np 4 -c 8192 -n 256" in page
    assert "ollama create tiny_moondream2 -f Modelfile" in page


def test_answers_are_cut_where_the_runs_own_were(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "my model (2)")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 12}')
    export(folder, tmp_path / "gguf", "f16")
    assert "PARAMETER num_predict 12\n" in (tmp_path / "gguf" / "Modelfile").read_text()
    page = (tmp_path / "gguf" / "README.md").read_text()
    assert "-n 12\n" in page and "ollama create my-model-2- -f Modelfile\n" in page


def test_a_tensor_is_written_before_the_next_is_read(tmp_path, monkeypatch):
    order = []

    class Weights:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def get_tensor(self, name):
            order.append("read")
            return self.file.get_tensor(name)

    safe_open, write_tensor = export_gguf.safe_open, gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(export_gguf, "safe_open", Weights)
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_tensor_data", lambda *arguments: (order.append("write"), write_tensor(*arguments))
    )
    export(TINY, tmp_path / "gguf", "f16")
    assert order.count("read") == 80  # a bias and a weight each; the vision encoder's q, k and v are read as one
    assert not any(pair == ("read", "read") for pair in pairwise(order))


# ---------------------------------------------------------------------------------------------------------------------
# What can't be exported
# ---------------------------------------------------------------------------------------------------------------------


def changed(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def replaced(folder, by):
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


SPOILT = {
    "no folder": (shutil.rmtree, "there is no folder {}: give that of a saved model, a run's OUTPUT_DIR"),
    "no model yet": (lambda folder: (folder / "config.json").unlink(), "{} holds no model, as no config.json: "),
    "another model": (partial(changed, model_type="llama"), "{} is not Moondream2 of 2024-08-26 or"),
    "a later commit": (partial(changed, architectures=["HfMoondream"]), "(found HfMoondream, of another commit"),
    "a release whose engine is another": (
        partial(replaced, by=TINY_2025),
        "{} can't be exported: llama.cpp has no path for a prefix whose positions see each other both ways. "
        "Serve it with Moondream's own engine: docs/serving.md",
    ),
    "adapters alone": (
        lambda folder: (folder / "adapter_config.json").touch(),
        "{} is not Moondream2 of 2024-08-26 or 2025-06-21 (it holds an adapter",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "cannot load {}: No such file or directory",
    ),
    "half of the weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:99999]),
        "cannot load {}: ",
    ),
    "a part is missing": (
        lambda folder: without(folder, "text_model.lm_head.linear.bias"),
        "cannot load {}: File does not contain tensor text_model.lm_head.linear.bias",
    ),
    "an export": (lambda folder: (folder / "gguf").mkdir(), "{}/gguf is there already: remove it, or give another"),
}


@pytest.mark.parametrize(("spoil", "line"), SPOILT.values(), ids=SPOILT)
def test_a_line_says_what_is_wrong_and_nothing_is_written(tmp_path, monkeypatch, spoil, line):
    monkeypatch.setattr(export_gguf, "write", lambda *arguments: pytest.fail("it took minutes to notice"))
    folder = shutil.copytree(TINY, tmp_path / "model")
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        export(folder, folder / "gguf", "f16")
    assert line.format(folder) in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_came_meanwhile_stays(tmp_path, monkeypatch):
    target = tmp_path / "gguf"
    write = export_gguf.write
    monkeypatch.setattr(export_gguf, "write", lambda *arguments: (target.mkdir(exist_ok=True), write(*arguments)))
    with pytest.raises(InputError, match="gguf is there already"):
        export(TINY, target, "f16")
    assert list(tmp_path.iterdir()) == [target] and not list(target.iterdir())


def test_a_disk_without_room_is_said_before(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10**6)
    monkeypatch.setattr(export_gguf.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=rf"the export takes 0.005 GB in {tmp_path}, where 0.0 are free$"):
        export(TINY, tmp_path / "gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        with pytest.raises(InputError, match=f"^cannot write {tmp_path}/gguf: the disk is full, or takes no more .+$"):
            export(TINY, tmp_path / "gguf", "f16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_numbers_that_float16_lacks_are_refused(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["text_model.transformer.h.0.mlp.fc1.weight"][3, 5] = 1e5
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="blk.0.ffn_up.weight holds what float16 can't: give --type bf16"):
        export(folder, folder / "gguf", "f16")
    assert not (folder / "gguf").exists()
    export(folder, folder / "gguf", "bf16")
    assert stored(folder / "gguf" / "text-model-bf16.gguf")["blk.0.ffn_up.weight"][1].max() > 9e4


def test_without_its_library_a_line_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(export_gguf, "gguf", None)
    with pytest.raises(InputError, match="does without: pip install gguf==[0-9.]+$"):
        export(TINY, tmp_path / "gguf", "f16")
    assert export_gguf.PACKAGE in (ROOT / "tests" / "requirements.txt").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# The whole way
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_fine_tuned_without_tiles_is_served_as_it_was_scored(run_main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    quickly = {"epochs": 3, "batch_size": 8, "learning_rate": 3e-4, "valid_answers": 0}
    run_main(model_id=TINY, output_dir=out, features_dir=tmp_path / "features", tiles="false", **quickly)
    monkeypatch.setattr(sys, "argv", ["export_gguf.py", str(out)])
    export_gguf.main()
    assert f"Saved to {out}/gguf, " in capsys.readouterr().out
    engine, tokenizer = Engine(out / "gguf"), AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    right, large = {"served": 0, "own": 0}, 0
    for line in map(json.loads, (ROOT / "valid.jsonl").read_text(encoding="utf-8").splitlines()[::4]):
        picture = (ROOT / line["image_path"]).read_bytes()
        image = Image.open(io.BytesIO(picture))
        large += max(image.size) >= 512
        own = model.answer_question(model.encode_image(image), line["question"], tokenizer)
        served = engine.ask([picture_part(picture), text_part(line["question"])], max_tokens=64)[0]
        assert served.strip() == own, line
        for name, answer in (("served", served), ("own", own)):
            right[name] += METRICS["correct"].score(answer, [line["answer"]])
    assert right["served"] == right["own"] > 12 and large > 10  # of 24
