"""Constants and flags: one mechanism, one line for whatever is wrong."""

import ast
import errno
import re
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import torch

import finetune_moondream as script
from moondream2 import cli
from moondream2.cli import InputError
from tests.shared import ROOT, run_python

KINDS = {name: kind for name, kind in get_type_hints(script).items() if name.isupper()}
NAMES = list(KINDS)
WHOLE_NUMBERS = [name for name, kind in KINDS.items() if kind in (int, int | None)]
NUMBERS = [*WHOLE_NUMBERS, *(name for name, kind in KINDS.items() if kind is float)]
TEXTS = [name for name, kind in KINDS.items() if kind in (str, str | None)]
MAY_BE_ZERO = {"WARMUP_STEPS", "WEIGHT_DECAY", "VALID_ANSWERS", "SEED"}
GROUPS = {
    "What": ["MODEL_ID", "REVISION", "TRAIN_FILE", "VALID_FILE", "TEST_FILE", "OUTPUT_DIR", "TILES"],
    "How": ["EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "LORA_RANK"],
    "The machine": ["GRAD_ACCUM_STEPS", "GRADIENT_CHECKPOINTING", "COMPILE", "GROUP_BY_PICTURE", "FEATURES_DIR"],
    "The optimizer": ["LR_SCHEDULE", "WARMUP_STEPS", "WEIGHT_DECAY", "BETAS", "MAX_GRAD_NORM"],
    "Judging": ["PATIENCE", "VALID_ANSWERS", "CHECKPOINT_MINUTES", "OVERWRITE", "TRACKER", "SEED"],
}


def parse(*argv):
    return cli.parse(script, argv)


@pytest.fixture
def edited(monkeypatch):
    """`edited(EPOCHS=3)` parses the block with these values in it, and no flags."""

    def parse_edited(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(script, name, value)
        return parse()

    return parse_edited


def help_of(module, capsys):
    with pytest.raises(SystemExit) as done:
        cli.parse(module, ["--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_without_flags_the_constants_hold():
    assert vars(parse()) == {name.lower(): vars(script)[name] for name in NAMES}


def test_the_original_runs_constants():
    assert script.MODEL_ID == "vikhyatk/moondream2"
    assert (script.TRAIN_FILE, script.VALID_FILE) == ("train.jsonl", "valid.jsonl")
    assert script.OUTPUT_DIR == "./moondream_crosswalks_finetuned"
    assert (script.EPOCHS, script.BATCH_SIZE, script.LEARNING_RATE, script.MAX_GRAD_NORM) == (5, 2, 3e-5, 1.0)


def test_constants_may_change_that_leave_the_training_what_it_is():
    expected = {"OUTPUT_DIR", "EPOCHS", "FEATURES_DIR", "PATIENCE", "CHECKPOINT_MINUTES", "OVERWRITE", "TRACKER"}
    assert cli.may_change(script) == expected | {"GRADIENT_CHECKPOINTING", "COMPILE"}


def test_flags_override_and_are_typed():
    got = parse(
        "--epochs", "3", "--learning_rate=1e-4", "--overwrite", "true", "--patience", "2", "--output_dir", "a/b"
    )
    assert (got.epochs, got.learning_rate, got.overwrite, got.patience) == (3, 1e-4, True, 2)
    assert (type(got.epochs), type(got.output_dir)) == (int, str)
    assert parse("--group_by_picture", "false").group_by_picture is False
    assert parse("--epochs=3", "--epochs", "4").epochs == 4  # as every shell command has it


@pytest.mark.parametrize("text", ["0.8,0.9", "0.8, 0.9", "(0.8, 0.9)"])
def test_a_pair_of_numbers_has_a_comma(text):
    assert parse("--betas", text).betas == (0.8, 0.9)


@pytest.mark.parametrize("name", NAMES)
def test_none_is_a_value_where_there_may_be_none(name, edited):
    flag = f"--{name.lower()}"
    if type(None) in get_args(KINDS[name]):
        assert getattr(parse(flag, "none"), name.lower()) is None
        assert getattr(edited(**{name: None}), name.lower()) is None
    else:
        with pytest.raises(InputError, match=f"^{name} must .*, not None$"):
            edited(**{name: None})
    if KINDS[name] is str:
        assert getattr(parse(flag, "none"), name.lower()) == "none"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "  ", "nan", "-1", "inf", "[]", "1.5.2"])
def test_an_unusable_flag_names_the_constant(name, value):
    if name in TEXTS and value.strip():
        assert getattr(parse(f"--{name.lower()}={value}"), name.lower()) == value
    else:
        with pytest.raises(InputError, match=f"^{name} must [^\n]*, not [^\n]+$"):
            parse(f"--{name.lower()}={value}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [object(), [], (), "", "  ", "5", "true", float("nan"), float("inf"), -1])
def test_an_unusable_constant_in_the_block_is_named(name, value, edited):
    if name in TEXTS and value in ("5", "true"):
        assert getattr(edited(**{name: value}), name.lower()) == value
    else:
        with pytest.raises(InputError, match=f"^{name} must .*, not {re.escape(repr(value))}$"):
            edited(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_is_refused_where_it_means_nothing(name, edited):
    if name in MAY_BE_ZERO:
        assert getattr(parse(f"--{name.lower()}=0"), name.lower()) == 0
        assert getattr(edited(**{name: 0}), name.lower()) == 0
    else:
        for attempt in (lambda: parse(f"--{name.lower()}=0"), lambda: edited(**{name: 0})):
            with pytest.raises(InputError, match=f"^{name} must be greater than 0, not 0$"):
                attempt()


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_half_an_epoch_is_refused(name, edited):
    for attempt in (lambda: parse(f"--{name.lower()}=1.5"), lambda: edited(**{name: 1.5})):
        with pytest.raises(InputError, match=f"^{name} must be a whole number, not 1.5$"):
            attempt()


@pytest.mark.parametrize("betas", ["1,0.9", "0.9,1.0"])
def test_a_mean_that_forgets_nothing_is_refused(betas):
    with pytest.raises(InputError, match=f"^BETAS must be less than 1, not {betas}$"):
        parse("--betas", betas)


@pytest.mark.parametrize(
    ("betas", "line"),
    [
        ((0.9,), "BETAS must have more items, not (0.9,)"),
        ((0.9, 0.9, 0.9), "BETAS must have at most 2 items, not (0.9, 0.9, 0.9)"),
        ((0.9, 0.0), "BETAS must be greater than 0, not (0.9, 0.0)"),
        (0.9, "BETAS must be numbers with a comma between them, not 0.9"),
    ],
)
def test_other_than_two_betas_are_refused(betas, line, edited):
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        edited(BETAS=betas)


def test_true_is_no_number(edited):
    with pytest.raises(InputError, match="^EPOCHS must be a whole number, not True$"):
        edited(EPOCHS=True)


@pytest.mark.parametrize("name", ["LR_SCHEDULE", "TRACKER"])
def test_one_of_a_few_choices(name, capsys, edited):
    with pytest.raises(InputError, match=f"^{name} must be '.+', '.+' or '.+', not step$"):
        parse(f"--{name.lower()}", "step")
    with pytest.raises(InputError, match=f"^{name} must be '.+', '.+' or '.+', not 'step'$"):
        edited(**{name: "step"})
    shown = re.search(rf"--{name.lower()} (\S+)", help_of(script, capsys))[1]
    for choice in shown.split("|"):
        assert getattr(parse(f"--{name.lower()}", choice), name.lower()) == choice


def test_an_unknown_flag_is_named_with_the_nearest():
    for words in (["--epocs", "3"], ["--epoch=3"], ["--EPOCHS", "3"]):
        with pytest.raises(InputError, match=rf"^unknown flag {words[0].split('=')[0]}: did you mean --epochs\?$"):
            parse(*words)
    with pytest.raises(InputError, match="^unknown flag train: --help lists all flags$"):
        parse("train")
    with pytest.raises(InputError, match="--epochs: expected one argument"):
        parse("--epochs")


def test_help_lists_every_constant_with_default_and_comment(capsys):
    text, found = " ".join(help_of(script, capsys).split()), cli.comments(script)
    for name in NAMES:
        comment = found[name][1]
        assert comment, f"{name} has no comment"
        shown = re.escape(f"{comment} (default: {vars(script)[name]})")
        assert re.search(rf"--{name.lower()} (\S+ )?{shown}", text), name


def test_help_has_the_blocks_headings_in_its_order(capsys):
    shown = {}
    for heading, flag in re.findall(
        r"^(?:(\S.*):|  --(\w+).*)$", help_of(script, capsys).split("exit\n")[1], re.MULTILINE
    ):
        if heading:
            names = shown[heading] = []
        else:
            names.append(flag.upper())
    assert list(shown.values()) == list(GROUPS.values())
    assert all(heading.startswith(start) for heading, start in zip(shown, GROUPS, strict=True))
    block = (ROOT / "finetune_moondream.py").read_text(encoding="utf-8")
    assert re.findall(r"^# (.+?) -+$", block, re.MULTILINE) == list(shown)


def test_a_constant_without_comment_or_heading_is_a_flag_all_the_same(tmp_path, capsys):
    file = tmp_path / "edited.py"
    file.write_text('''"""Trains."""
RATE: float = 0.5
# At 5% ---
# Not a heading --- of any kind
SHARE: float = 0.1  # 10% # of it
NOTE: str = "# none ---"
''')
    edited = ModuleType("edited")
    edited.__file__ = str(file)
    exec(file.read_text(), vars(edited))
    assert vars(cli.parse(edited, ["--rate", "1"])) == {"rate": 1.0, "share": 0.1, "note": "# none ---"}
    text = " ".join(help_of(edited, capsys).split())
    assert text.endswith("--rate (default: 0.5) At 5%: --share 10% # of it (default: 0.1) --note (default: # none ---)")


def test_importing_cli_only_defines():
    definitions = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
    docstring, *statements = ast.parse((ROOT / "moondream2" / "cli.py").read_text(encoding="utf-8")).body
    assert [ast.unparse(each) for each in statements if not isinstance(each, definitions)] == []
    assert (
        run_python("import moondream2.cli, sys; print('torch' in sys.modules)", ROOT, PYTHONPATH=str(ROOT)) == "False\n"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "error: a/b: Permission denied"),
        (ConnectionError("the tracker does not answer"), "error: the tracker does not answer"),
        (InputError("what, where"), "error: what, where"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of"),
            "error: CUDA out of memory: docs/troubleshooting.md says how to take less",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_line(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as done:
        cli.run(main)
    assert done.value.code == line


def test_ctrl_c_ends_a_program_as_a_shell_has_it():
    def main():
        raise KeyboardInterrupt

    with pytest.raises((SystemExit, KeyboardInterrupt)) as done:
        cli.run(main)
    assert done.type is SystemExit and done.value.code == 130


def test_what_no_person_can_mend_is_told_whole():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.run(main)


def test_a_program_ends_without_looking_for_garbage():
    """For which Python would go through all that was imported; what a program leaves is gone with its process."""
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
    assert run_python(code + "from moondream2 import cli; cli.run(int)", ROOT, PYTHONPATH=str(ROOT)) == "True\n"
