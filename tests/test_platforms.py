"""Windows and macOS, under stand-ins: docs/platforms.md says what that shows and what it does not."""

import ast
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moondream2 import launch
from tests.child import Child
from tests.on_windows import FORBIDDEN, train
from tests.shared import ROOT, TINY

ODD = "Is it 安全, señor?"


@pytest.fixture
def flags(data, tmp_path):
    """Of a run whose texts no code page of one byte can say."""
    for name in ("train", "valid"):
        path = data / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines[0] |= {"question": ODD}
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
    return {
        "model_id": TINY,
        "train_file": data / "train.jsonl",
        "valid_file": data / "valid.jsonl",
        "features_dir": tmp_path / "features",
        "output_dir": tmp_path / "out",
        "epochs": 2,
        "batch_size": 8,
    }


def test_a_run_and_its_resumption_under_windows(flags, tmp_path):
    words = "\n".join(word for name, value in flags.items() for word in (f"--{name}", str(value)))
    child = Child(train, tmp_path / "printed", environment={"FLAGS": words, "ACCELERATE_USE_CPU": "true"})
    assert child.wait() == 0, (tmp_path / "printed").read_bytes().decode("cp1252")
    printed = (tmp_path / "printed").read_bytes().decode("cp1252")
    assert "Going on in epoch 3 after step 0" in printed and "Saved to" in printed
    assert r"Is it \u5b89\u5168, señor?" in printed
    out = tmp_path / "out"
    assert {"model.safetensors", "report.html", "predictions.jsonl", "training_log.jsonl"} <= {
        path.name for path in out.iterdir()
    }
    assert not (out / "checkpoints").exists()
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert predictions[0]["question"] == ODD and ODD in (out / "report.html").read_text(encoding="utf-8")
    for name in ("predictions.jsonl", "training_log.jsonl", "report.html"):
        assert b"\r" not in (out / name).read_bytes()
    written = [path for folder in (out, tmp_path / "features") for path in folder.rglob("*")]
    assert [path for path in written if FORBIDDEN.search(path.name)] == []


def opens_text_without_encoding(node):
    """Whether it is a call that opens a file for text in the encoding of the system, which on Windows is not UTF-8."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    if name in ("open", "io.open") or name.endswith((".open", ".read_text", ".write_text")):
        of_others = name in ("Image.open", "os.open", "tokenize.open", "self.write_text")
        binary = any(isinstance(each, ast.Constant) and each.value in ("rb", "wb") for each in node.args)
        return not (of_others or binary or any(keyword.arg == "encoding" for keyword in node.keywords))
    return False


def test_all_text_is_read_and_written_in_utf8():
    calls = ["open('a')", "open('a', 'w')", "path.open()", "path.read_text()", "path.write_text(text, newline='')"]
    assert all(opens_text_without_encoding(ast.parse(call).body[0].value) for call in calls)
    for file in (ROOT / "finetune_moondream.py", *(ROOT / "moondream2").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not opens_text_without_encoding(node), f"{file.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_terminal_lacks_is_printed_all_the_same(encoding):
    code = r"""
from moondream2 import cli
def main():
    print("\u5b89 \xf1 \udcff")  # the last is half a character, as in a file's name that is not UTF-8
    raise cli.InputError("\u5b89 \xf1 \udcff")
cli.run(main)
"""
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    expected = "\u5b89 \xf1 \udcff".encode(encoding, "backslashreplace")
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (1, expected, b"error: " + expected)


def test_a_process_that_prints_nothing_may_be_told_anything(monkeypatch):
    """As its terminal may be: what it does not print goes to a file, whose encoding Windows has its own mind about."""
    silent = SimpleNamespace(is_main_process=False, num_processes=2)
    with launch.one_speaks(silent):
        assert sys.stdout.encoding == "utf-8"
        print("\u5b89 \udcff", flush=True)
