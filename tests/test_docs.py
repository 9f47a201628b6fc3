"""README.md and docs/: what they link to, name, quote and tell to type is there. No model is run."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import finetune_moondream as script
from moondream2 import cli, loading
from moondream2.data import parse_line
from moondream2.export_gguf import README as README_OF_EXPORT
from moondream2.modeling_moondream2 import HfMoondreamConfig
from moondream2.output_dir import MARKER, NAMES
from tests.shared import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"^    (?:.*\\\n)*.+", re.M)  # a line that ends in a backslash goes on in the next
INLINE = re.compile(r"`([^`]+)`")
OTHERS = {"CUDA out of memory"}  # a message of torch
# That pages name.
ENVIRONMENT = {"ACCELERATE_USE_CPU", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF"}
OTHER_FLAGS = {"--machine_rank", "--shm-size"}  # of accelerate, and of a container's start
RUNNABLE = re.compile(r"(\w+=\S+ )*(python|accelerate|pip|hf|llama-server) ")

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page):
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def inline(page):
    """Its words in backquotes, each on one line."""
    return [" ".join(words.split()) for words in INLINE.findall(INDENTED.sub("", prose(page)))]


def commands(page):
    """All that it tells to type, as lists of words."""
    blocks = [line for block in FENCED.findall(page.read_text(encoding="utf-8")) for line in block.splitlines()]
    lines = [*inline(page), *(line.strip().replace("\\\n", " ") for line in INDENTED.findall(prose(page))), *blocks]
    return [shlex.split(part) for line in lines if RUNNABLE.match(line) for part in line.split(" && ")]


def anchors(page):
    """What links to its headings end in, by GitHub's rule."""
    headings = re.findall("^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def texts_of(file):
    """The texts in a source file, with … for what an f-string fills in."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


@page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(page))
    for link in links:
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page():
    links = re.findall(r"\]\((docs/[^)#]+)", README.read_text(encoding="utf-8"))
    assert {ROOT / link for link in links} == set(PAGES) - {README}


@page
def test_lines_fit(page):
    """A table's lines can't go on below."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


# ---------------------------------------------------------------------------------------------------------------------
# What they tell to type
# ---------------------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    pass


def parse_program(name, words, monkeypatch):
    """Parses what is typed behind `python -m name` by the program's own parser, and ends the program there."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse(*arguments):
        raise Parsed(*parse_known_args(*arguments))

    program = importlib.import_module(name)
    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [name, *words])
        program.main()
    _, unknown = parsed.value.args
    if name == "tests.scaling":  # hands flags that it does not know to the script
        cli.parse(script, unknown)
    else:
        assert not unknown, unknown


def check(words, monkeypatch):
    match words:
        case ["python", "finetune_moondream.py", "--help"]:
            pass
        case ["python", "finetune_moondream.py", *flags]:
            cli.parse(script, flags)
        case ["accelerate", "launch", *flags]:
            launch = launch_command_parser().parse_args(flags)
            assert launch.training_script == "finetune_moondream.py"
            assert launch.config_file is None or (ROOT / launch.config_file).is_file()
            cli.parse(script, launch.training_script_args)
        case ["python", "-m", "pytest"]:
            pass
        case ["python", "-m", name, *arguments]:
            parse_program(name, arguments, monkeypatch)
        case ["pip", "install", *packages]:
            lists = [after for word, after in zip(packages, packages[1:], strict=False) if word == "-r"]
            assert all((ROOT / each).is_file() for each in lists)
        case ["hf", "upload", _, folder, ".", *flags]:
            assert folder == Path(script.OUTPUT_DIR).name
            shows_data = {name for name in NAMES if "report" in name or "predictions" in name}
            assert {*flags} == {"--private", "--exclude", *shows_data}
        case ["hf", "auth", "login"]:
            pass
        case ["hf", "download", *flags]:
            known = [(script.MODEL_ID, release.commit) for release in loading.RELEASES.values()]
            assert (flags[0], flags[2]) in [*known, HfMoondreamConfig.TOKENIZER] and flags[1] == "--revision"
        case ["llama-server", *flags]:
            files = "text-model-f16.gguf", "mmproj-f16.gguf"
            assert " ".join(["llama-server", *(flag.split("/")[-1] for flag in flags)]) in README_OF_EXPORT.format(
                "name", *files, flags[-1], "It is seen."
            )
        case _:
            pytest.fail(f"unknown command: {shlex.join(words)}")


@page
def test_commands_can_be_typed(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        check(words, monkeypatch)


def test_a_flag_that_is_none_is_noticed(monkeypatch):
    for command, error in (
        ("python finetune_moondream.py --epoch 3", cli.InputError),
        ("python finetune_moondream.py --epochs 0", cli.InputError),
        ("accelerate launch --num_processes 2 finetune_moondream.py --epoch 3", cli.InputError),
        ("python -m tests.scaling --epoch 3", cli.InputError),
        ("python -m tests.benchmark --epochs 3", AssertionError),
        ("python -m moondream2.ask folder picture.jpg Why? --epochs 3", AssertionError),
    ):
        with pytest.raises(error):
            check(command.split(), monkeypatch)


def test_the_two_commands_are_those_that_ci_runs():
    """A command that goes on in the next line is one."""
    (pattern,) = re.findall(r"sed -nE 's/(.+)/\\1/p'", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert re.findall(pattern, re.sub(r" *\\\n *", " ", README.read_text(encoding="utf-8")), re.M)[:2] == [
        "pip install -r requirements.txt && "
        "python finetune_moondream.py --model_id tests/tiny_moondream2 --test_file tests/test.jsonl",
        "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest",
    ]


def test_the_readmes_python_asks_the_default_output_dir():
    (block,) = re.findall("^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    texts = [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert Path(script.OUTPUT_DIR).name in texts
    assert all((ROOT / text).is_file() for text in texts if str(text).startswith("images/"))


def test_the_readmes_line_is_one_of_data():
    (line,) = [line for line in INDENTED.findall(README.read_text(encoding="utf-8")) if line.strip().startswith("{")]
    assert all(parse_line(line, "<|endoftext|>", is_labelled=True))


# ---------------------------------------------------------------------------------------------------------------------
# What they name
# ---------------------------------------------------------------------------------------------------------------------


@page
def test_constants_and_flags_exist(page):
    constants = set(cli.annotations(script))
    assert set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", page.read_text(encoding="utf-8"))) <= constants | ENVIRONMENT
    programs = [*(ROOT / "tests").glob("*.py"), *(ROOT / "moondream2").glob("*.py")]
    options = {flag for file in programs for flag in re.findall(r'add_argument\("(--\w+)"', file.read_text("utf-8"))}
    options |= OTHER_FLAGS
    for words in inline(page):
        if words.startswith("--") and not options.issuperset(re.findall(r"--[\w-]+", words)):
            cli.parse(script, shlex.split(words))


@page
def test_files_exist(page):
    for words in inline(page):
        if re.match(r"(moondream2|tests|docs|images|\.ci)/|finetune_moondream\.py$", words):
            assert (ROOT / words).exists(), words


def test_the_table_of_output_dir_is_what_a_run_writes():
    table = re.search(r"^OUTPUT_DIR then holds\n(.*?)\n\n[^|]", README.read_text(encoding="utf-8"), re.M | re.S)[1]
    names = {name for row in table.splitlines() if row.startswith("| `") for name in INLINE.findall(row.split("|")[1])}
    assert names == {name for name in NAMES if not name.startswith((".", "tokenizer", "checkpoints"))}
    assert f"`{MARKER}`" in README.read_text(encoding="utf-8")


def test_the_house_names_every_file_of_the_package():
    rows = re.findall(r"^\| (`.+?) \|", prose(ROOT / "docs" / "house.md"), re.M)
    files = {path.name for path in (ROOT / "moondream2").iterdir() if path.is_file() and path.name != "__init__.py"}
    assert {name for row in rows for name in INLINE.findall(row)} == files


def test_messages_are_those_of_the_sources():
    files = [ROOT / "finetune_moondream.py", *(ROOT / "moondream2").glob("*.py")]
    texts = [" ".join(text.split()) for file in files for text in texts_of(file)]
    rows = re.findall(r"^\| (`.+?) \|", prose(ROOT / "docs" / "troubleshooting.md"), re.M)
    messages = [message for row in rows for message in INLINE.findall(row)]
    assert len(messages) > 20
    for message in set(messages) - OTHERS:
        assert any(message.strip(" …") in text for text in texts), message
