"""Models that are no Moondream2 of a known release are refused in a line, and what they bring never runs."""

import ast
import builtins
import hashlib
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

import finetune_moondream as script
from moondream2 import ask, loading
from moondream2.cli import InputError
from tests.shared import ROOT, TINY, TINY_2025

CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Path(__file__).with_name("ran").touch()

class Config(PretrainedConfig):
    model_type = "other"

class Model(PreTrainedModel):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
}
KERNEL = "kernels-community/flash-attn"  # transformers fetches its code by itself


class Command:
    """What runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return exec, (f"open({str(self.file)!r}, 'w')",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`folder(config, tokenizer)`: the small checkpoint with code of its own, and with these changes."""
    monkeypatch.setattr(builtins, "input", lambda *question: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    copy = tmp_path / "model"

    def make(config=None, tokenizer=None):
        shutil.copytree(TINY, copy)
        (copy / "code.py").write_text(CODE)
        for name, change in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | (change or {})))
        return copy

    yield make
    assert not list(tmp_path.rglob("ran"))


def refused(load, folder):
    """What stands in brackets of the line that refuses it."""
    with pytest.raises(InputError) as error:
        load(folder)
    start = f"{folder} is not Moondream2 of 2024-08-26 or 2025-06-21 ("
    end = (
        "): give vikhyatk/moondream2 as MODEL_ID, and 92d3d73b6fd61ab84d9fe093a9c7fd8c04bf2c0d or "
        "9a7d4024050840e001defacec2b00727e89149e6 as REVISION"
    )
    line = str(error.value)
    assert line.startswith(start) and line.endswith(end) and "\n" not in line and "trust_remote_code" not in line
    return line.removeprefix(start).removesuffix(end)


def trains(folder):
    script.load_tokenizer(str(folder), None)
    return script.load_model(str(folder), None)


def asks(folder):
    return ask.load(str(folder))


loads = pytest.mark.parametrize("load", [trains, asks])


@loads
@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "other", "auto_map": CLASSES}, "found other, with code of its own, which is not run"),
        ({"model_type": "llama", "auto_map": CLASSES}, "found llama, with code of its own, which is not run"),
        ({"model_type": "llama"}, "found llama"),
        ({"model_type": "other"}, "found other"),
        ({"model_type": None}, "found no model_type in a config.json"),
        ({"attn_implementation": KERNEL}, "it names code for its attention, which is not fetched"),
        ({"_attn_implementation": f"paged|{KERNEL}"}, "it names code for its attention, which is not fetched"),
        (
            {"text_config": {"attn_implementation": KERNEL}},
            "it names code for its attention, which is not fetched",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "its weights are quantized"),
    ],
)
def test_another_model_is_refused_at_its_configuration(folder, load, config, found):
    assert refused(load, folder(config)) == found


@loads
def test_a_folder_without_a_configuration_is_refused(folder, load):
    file = folder() / "config.json"
    file.write_text("[]")
    assert refused(load, file.parent) == "found no model_type in a config.json"


@loads
def test_the_folder_of_a_run_that_has_not_ended_is_refused(folder, load):
    model = folder()
    (model / "config.json").unlink()
    with pytest.raises(InputError) as error:
        load(model)
    assert str(error.value) == f"{model} holds no model, as no config.json: a run saves its own there when it ends"


@loads
def test_a_configuration_that_makes_no_sense_is_refused(folder, load):
    assert refused(load, folder({"text_config": 5}))


@loads
def test_moondreams_own_network_is_taken_for_that_which_a_folder_brings(folder, load):
    """The hub's Moondream2 brings its code as well."""
    load(folder({"auto_map": CLASSES}, {"auto_map": {"AutoTokenizer": CLASSES["AutoTokenizer"]}}))


@loads
def test_a_tokenizer_that_only_its_own_code_can_read_is_refused(folder, load):
    other = folder(None, {"auto_map": {"AutoTokenizer": CLASSES["AutoTokenizer"]}, "tokenizer_class": "Tokenizer"})
    assert refused(load, other) == "it brings code of its own, which is not run"


@loads
def test_a_way_to_generate_that_a_folder_brings_is_not_run(folder, load):
    copy = folder()
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(CODE)
    (copy / "generation_config.json").write_text("{}")
    load(copy)


@loads
@pytest.mark.parametrize("save", [lambda content, file: file.write_bytes(pickle.dumps(content)), torch.save])
def test_pickled_weights_run_no_code(folder, load, save, tmp_path):
    copy = folder()
    (copy / "model.safetensors").unlink()
    save({"weight": Command(tmp_path / "ran")}, copy / "pytorch_model.bin")
    assert refused(load, copy) == "its weights are a pickle of more than tensors, which may be code"


def test_pickled_tensors_are_loaded(folder):
    copy = folder()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    weights, expected = trains(copy).state_dict(), trains(TINY).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@loads
def test_an_adapter_is_refused(folder, load):
    """With peft installed transformers would load the model that it names."""
    copy = folder()
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/model"}))
    assert refused(load, copy) == "it holds an adapter, which this script can't train or ask"


def test_every_loading_says_that_no_code_is_run():
    """Where it is not said, transformers asks the person at the terminal."""
    calls = [
        node
        for file in (ROOT / "finetune_moondream.py", *(ROOT / "moondream2").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(".from_pretrained")
        and ast.unparse(node.func) != "super().from_pretrained"  # which hands on what it was told
    ]
    said = [[each.value.value for each in call.keywords if each.arg == "trust_remote_code"] for call in calls]
    assert len(calls) >= 5 and said == [[False]] * len(calls)


# ---------------------------------------------------------------------------------------------------------------------
# Which release it is, where several have one form
# ---------------------------------------------------------------------------------------------------------------------

COMMIT = "9a7d4024050840e001defacec2b00727e89149e6"  # of 2025-06-21
OTHER = "0" * 40


@pytest.fixture
def as_downloaded(tmp_path):
    """A folder as the hub has it: the mark of what this project saves is missing, and the tokenizer lies in its own."""
    copy = tmp_path / "weights"
    shutil.copytree(TINY_2025, copy)
    config = json.loads((copy / "config.json").read_text())
    assert config.pop("release") == "2025-06-21"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "starmie-v1").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).rename(copy / "starmie-v1" / name)
    return copy


def note_commit(folder, commit):
    """As `hf download --local-dir` does."""
    noted = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    noted.parent.mkdir(parents=True)
    noted.write_text(f"{commit}\n0000\n1700000000.0\n")


def know(monkeypatch, folder, name):
    """The digest of a file of this folder stands where that of the released file does."""
    known = loading.RELEASES["HfMoondream"]
    assert name in known.files
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    monkeypatch.setitem(loading.RELEASES, "HfMoondream", known._replace(files={**known.files, name: digest}))


@loads
@pytest.mark.parametrize("told_by", ["mark", "commit", "config.json", "model.safetensors"])
def test_a_folder_that_can_be_told_to_be_of_2025_06_21_is_loaded(as_downloaded, monkeypatch, load, told_by):
    if told_by == "commit":
        note_commit(as_downloaded, COMMIT)
    elif told_by != "mark":
        know(monkeypatch, as_downloaded, told_by)
    load(TINY_2025 if told_by == "mark" else as_downloaded)


@loads
@pytest.mark.parametrize("noted", [None, OTHER])
def test_a_folder_that_can_not_be_told_to_be_of_it_is_refused(as_downloaded, load, noted):
    if noted:
        note_commit(as_downloaded, noted)
    assert refused(load, as_downloaded) == "found HfMoondream, of another commit than that of 2025-06-21"


def test_the_released_files_are_told_by_their_digests():
    released = ROOT / "tests" / "golden" / "2025-06-21-config.json"
    files = loading.RELEASES["HfMoondream"].files
    assert files["config.json"] == loading.sha256(released) == hashlib.sha256(released.read_bytes()).hexdigest()
    assert files["model.safetensors"] == "70a7d94c0c8349eb58ed2d9e636ef2d0916960f321ecabeac6354b8ba3d7403f"
    assert loading.sha256(released.with_name("none")) is None


@pytest.fixture
def hub(as_downloaded, tmp_path):
    """`hub(commit)`: a cache of the hub with both repositories, the model's at this commit; its code ends a run."""

    def make(commit):
        snapshot = tmp_path / "hub" / "models--vikhyatk--moondream2" / "snapshots" / commit
        shutil.copytree(as_downloaded, snapshot, ignore=shutil.ignore_patterns("starmie-v1"))
        config = json.loads((snapshot / "config.json").read_text())
        names = {"AutoConfig": "hf_moondream.HfConfig", "AutoModelForCausalLM": "hf_moondream.HfMoondream"}
        (snapshot / "config.json").write_text(json.dumps(config | {"auto_map": names}))
        (snapshot / "hf_moondream.py").write_text("raise SystemExit('code of the hub runs')")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / file, snapshot)  # what is left over there
        starmie = tmp_path / "hub" / "models--moondream--starmie-v1" / "snapshots"
        commit_of_it = "35192e10a54e36eabe0a7cc57a2c1aab371cafc5"
        shutil.copytree(as_downloaded / "starmie-v1", starmie / commit_of_it)
        return tmp_path

    return make


def test_from_the_hub_its_files_are_loaded_and_none_of_its_code(hub, hub_is, data, run_main, capsys):
    flags = {"revision": COMMIT, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl", "epochs": 1}
    flags |= {"output_dir": data / "out", "features_dir": "none", "batch_size": 8, "valid_answers": 2}
    hub_is(hub(COMMIT))
    run_main(**flags)
    assert "Saved to" in capsys.readouterr().out
    saved = json.loads((data / "out" / "config.json").read_text())
    assert saved["release"] == "2025-06-21" and saved["auto_map"]["AutoConfig"].startswith("modeling_moondream2.")
    model, tokenizer = ask.load(data / "out")
    assert tokenizer.convert_ids_to_tokens(3) == "<|md_reserved_2|>" and tokenizer.eos_token_id == 0


def refused_by_a_run(run_main, data, revision):
    flags = {"train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl", "output_dir": data / "out"}
    with pytest.raises(InputError) as error:
        run_main(revision=revision, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_commit_of_the_hub_is_refused(hub, hub_is, data, run_main):
    hub_is(hub(OTHER))
    last = refused_by_a_run(run_main, data, OTHER)
    assert "vikhyatk/moondream2 is not Moondream2 of 2024-08-26 or 2025-06-21 (found HfMoondream, of another" in last


def test_without_the_hub_both_repositories_are_named(hub_is, data, tmp_path, run_main):
    hub_is(tmp_path / "empty")
    last = refused_by_a_run(run_main, data, COMMIT)
    assert last.startswith("cannot load vikhyatk/moondream2: ")
    assert f"`hf download vikhyatk/moondream2 --revision {COMMIT} --local-dir moondream2-weights` and `hf" in last
    tokenizer = "moondream/starmie-v1 --revision 35192e10a54e36eabe0a7cc57a2c1aab371cafc5"
    assert f"`hf download {tokenizer} --local-dir moondream2-weights/starmie-v1`, copy it" in last


@loads
def test_a_folder_that_lacks_the_tokenizer_says_where_it_is(as_downloaded, load, monkeypatch):
    note_commit(as_downloaded, COMMIT)
    shutil.rmtree(as_downloaded / "starmie-v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        load(as_downloaded)
    line = str(error.value)
    assert "\n" not in line and f"--local-dir {as_downloaded}/starmie-v1`" in line and "vikhyatk" not in line
