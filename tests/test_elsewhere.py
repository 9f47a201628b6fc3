"""The model in another process, on every transformers release that is supported.

What was saved is loaded there by its own code, as long as this project is not at hand; then, by this project's code,
what lies in the hub's cache, whose own code would end the process. It is one process, as one takes seconds to start.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from moondream2 import modeling_moondream2  # noqa: F401, which the Auto classes learn of

ROOT = Path(__file__).parent.parent
TINY = {"2024-08-26": ROOT / "tests" / "tiny_moondream2", "2025-06-21": ROOT / "tests" / "tiny_moondream2_2025"}
COMMITS = {
    "2024-08-26": "92d3d73b6fd61ab84d9fe093a9c7fd8c04bf2c0d",
    "2025-06-21": "9a7d4024050840e001defacec2b00727e89149e6",
}
STARMIE = "35192e10a54e36eabe0a7cc57a2c1aab371cafc5"
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"  # its name in from_pretrained
QUESTION = "What is it?"
CODE = f"""
import gc; gc.disable()  # imports in two thirds of their time
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(name, **options):
    return AutoModelForCausalLM.from_pretrained(name, **options)

told, image = {{}}, Image.open("picture.png")
for release in {list(TINY)}:
    model = load(f"saved {{release[:4]}}", trust_remote_code=True, {DTYPE}="float32")
    tokenizer = AutoTokenizer.from_pretrained(f"saved {{release[:4]}}")
    answers = [
        model.answer_question(model.encode_image(image), {QUESTION!r}, tokenizer),
        model.query(image, {QUESTION!r})["answer"],
    ]
    module = type(model).__module__
    model.half().save_pretrained(f"float16 {{release}}")
    tokenizer.save_pretrained(f"float16 {{release}}")
    again = load(f"float16 {{release}}", trust_remote_code=True, {DTYPE}="auto")
    types = sorted({{str(p.dtype) for p in again.parameters()}})
    again = again.float().query(image, {QUESTION!r})["answer"]
    told[release] = {{"answers": answers, "module": module, "types": types, "again": again}}

sys.path.insert(0, {str(ROOT)!r})
import moondream2.modeling_moondream2
for release, commit in {COMMITS}.items():
    for revision in (release, commit):
        model = load("vikhyatk/moondream2", revision=revision, {DTYPE}=torch.bfloat16)
        tokenizer = model.config.load_tokenizer("vikhyatk/moondream2", revision)
        found = {{
            "class": f"{{type(model).__module__}}.{{type(model).__name__}}",
            "types": sorted({{str(p.dtype) for p in model.parameters()}}),
            "ids": tokenizer({QUESTION!r}).input_ids,
            "ids of its own": model._tokenizer({QUESTION!r}).input_ids,
            "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
            "fifth": tokenizer.convert_ids_to_tokens(4),
        }}
        told[release].setdefault("of the hub", []).append(found)
    model.save_pretrained(f"hub {{release}}")
    tokenizer.save_pretrained(f"hub {{release}}")
print(json.dumps(told))
"""


def picture():
    image = Image.new("RGB", (300, 200), "teal")
    image.paste("white", (100, 10, 150, 100))
    return image


def of_folder(release):
    """The small model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(TINY[release], **{DTYPE: torch.float32}).eval()
    return model, AutoTokenizer.from_pretrained(TINY[release])


def lay_out_hub(cache):
    """A cache of the hub with both releases, whose code would end any process, and a tokenizer left over in one."""
    repository = cache / "models--vikhyatk--moondream2"
    (repository / "refs").mkdir(parents=True)
    for release, commit in COMMITS.items():
        snapshot = repository / "snapshots" / commit
        shutil.copytree(TINY[release], snapshot)
        (repository / "refs" / release).write_text(commit)
        config = json.loads((TINY[release] / "config.json").read_text())
        if release == "2024-08-26":
            names = {"AutoConfig": "configuration.MoondreamConfig", "AutoModelForCausalLM": "moondream.Moondream"}
            hub = {"architectures": ["Moondream"], "model_type": "moondream1", "torch_dtype": "float16"}
            hub |= {"text_config": {**config["text_config"], "model_type": "phi"}, "transformers_version": "4.44.0"}
            config = hub | {name: config[name] for name in ("vision_config", "region_features")}
        else:
            names = {"AutoConfig": "hf_moondream.HfConfig", "AutoModelForCausalLM": "hf_moondream.HfMoondream"}
            del config["release"]
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TINY["2024-08-26"] / file, snapshot)
        (snapshot / "config.json").write_text(json.dumps(config | {"auto_map": names}))
        for name in names.values():
            (snapshot / name).with_suffix(".py").write_text("raise SystemExit('code of the hub was run')")
    starmie = cache / "models--moondream--starmie-v1" / "snapshots" / STARMIE
    starmie.mkdir(parents=True)
    shutil.copy(TINY["2025-06-21"] / "tokenizer.json", starmie)
    (starmie / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizer"}))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder of models, and what a process there has told of each release."""
    folder = tmp_path_factory.mktemp("elsewhere")
    picture().save(folder / "picture.png")
    for release in TINY:
        for each in of_folder(release):
            each.save_pretrained(folder / f"saved {release[:4]}")
    lay_out_hub(folder / "home" / "hub")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-P", "-c", CODE], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return folder, json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("release", TINY)
def test_a_saved_model_loads_without_this_project(elsewhere, release):
    """And is saved again complete, as float16, by the lines of docs/using-the-model.md."""
    told, (model, tokenizer) = elsewhere[1][release], of_folder(release)
    assert told["module"].startswith("transformers_modules")
    expected = model.answer_question(model.encode_image(picture()), QUESTION, tokenizer)
    assert told["answers"] == [expected, expected]
    assert told["types"] == ["torch.float16"]
    assert told["again"] == model.half().float().query(picture(), QUESTION, tokenizer=tokenizer)["answer"]


@pytest.mark.parametrize(
    ("release", "name", "fifth"),
    [("2024-08-26", "Moondream", "$"), ("2025-06-21", "HfMoondream", "<|md_reserved_3|>")],
)
def test_loads_from_the_hub_without_running_its_code(elsewhere, release, name, fifth):
    folder, told = elsewhere
    tokenizer = AutoTokenizer.from_pretrained(TINY[release])
    ids = tokenizer(QUESTION).input_ids
    expected = {"class": f"moondream2.modeling_moondream2.{name}", "types": ["torch.bfloat16"], "ids": ids}
    expected |= {"ids of its own": ids, "ends": [0, 0], "fifth": fifth}
    assert told[release]["of the hub"] == [expected, expected]
    saved = json.loads((folder / f"hub {release}" / "config.json").read_text())
    assert saved.get("release") == (release if name == "HfMoondream" else None)
    assert saved["architectures"] == [name]
    assert saved["auto_map"] == {
        "AutoConfig": f"modeling_moondream2.{name}Config",
        "AutoModelForCausalLM": f"modeling_moondream2.{name}",
    }
    written = json.loads((folder / f"hub {release}" / "tokenizer_config.json").read_text())
    if release == "2025-06-21":
        assert written["tokenizer_class"].removesuffix("Fast") == "PreTrainedTokenizer", "4.51.3 knows no other name"
