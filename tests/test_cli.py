"""Constants and flags: one mechanism, one line for whatever is wrong."""

import errno
import subprocess
import sys

import pytest

import finetune_moondream as script
from moondream2 import cli
from moondream2.cli import InputError
from tests.conftest import ROOT

NAMES = [name for name in vars(script)["__annotations__"] if name.isupper()]
NUMBERS = [
    name for name in NAMES if isinstance(vars(script)[name], (int, float)) and vars(script)[name] not in (True, False)
]


def parse(*argv, **constants):
    return cli.parse({**vars(script), **constants}, argv, script.MAY_BE_ZERO, script.BELOW_ONE, script.CHOICES)


def test_without_flags_the_constants_hold():
    assert vars(parse()) == {name.lower(): vars(script)[name] for name in NAMES}


def test_the_original_runs_constants():
    assert script.MODEL_ID == "vikhyatk/moondream2"
    assert (script.TRAIN_FILE, script.VALID_FILE) == ("train.jsonl", "valid.jsonl")
    assert script.OUTPUT_DIR == "./moondream_crosswalks_finetuned"
    assert (script.EPOCHS, script.BATCH_SIZE, script.LEARNING_RATE, script.MAX_GRAD_NORM) == (5, 2, 3e-5, 1.0)


def test_flags_override_and_are_typed():
    got = parse("--epochs", "3", "--learning_rate=1e-4", "--betas", "0.8,0.9", "--overwrite", "true", "--patience", "2")
    assert (got.epochs, got.learning_rate, got.betas, got.overwrite, got.patience) == (3, 1e-4, (0.8, 0.9), True, 2)
    assert parse("--features_dir", "none").features_dir is None
    assert parse("--model_id", "none").model_id == "none"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "nan", "-1", "inf", "[]", "1.5.2"])
def test_an_unusable_flag_names_the_constant(name, value):
    takes_any_text = "str" in str(vars(script)["__annotations__"][name])
    if takes_any_text and value and name not in script.CHOICES:
        assert getattr(parse(f"--{name.lower()}={value}"), name.lower()) == value
    else:
        with pytest.raises(InputError, match=f"^{name} must"):
            parse(f"--{name.lower()}={value}")


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_is_refused_where_it_means_nothing(name):
    if name in script.MAY_BE_ZERO:
        assert getattr(parse(f"--{name.lower()}=0"), name.lower()) == 0
    else:
        with pytest.raises(InputError, match=f"^{name} must be .*more than 0, not 0"):
            parse(f"--{name.lower()}=0")


@pytest.mark.parametrize("name", NAMES)
def test_an_unusable_constant_in_the_block_is_named(name):
    for value in (object(), [], "" if isinstance(vars(script)[name], str) else "text"):
        if name in ("FEATURES_DIR",) and value == "text":
            continue
        with pytest.raises(InputError, match=f"^{name} must"):
            parse(**{name: value})


@pytest.mark.parametrize("betas", ["1,0.9", "0.9,1.0"])
def test_a_mean_that_forgets_nothing_is_refused(betas):
    with pytest.raises(InputError, match="^BETAS must be two numbers, more than 0 and less than 1, not"):
        parse("--betas", betas)


def test_true_is_no_number():
    with pytest.raises(InputError, match="EPOCHS must be a whole number, not True"):
        parse(EPOCHS=True)


def test_an_unknown_flag_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown flag --epocs: did you mean --epochs\?"):
        parse("--epocs", "3")
    with pytest.raises(InputError, match="unknown flag .*--help"):
        parse("train")
    with pytest.raises(InputError, match="--epochs"):
        parse("--epochs")


def test_help_lists_every_constant_with_default_and_reason(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    reasons = cli.comments(ROOT / "finetune_moondream.py")
    for name in NAMES:
        assert f"--{name.lower()} " in text
        assert reasons[name] and " ".join(reasons[name].split()) in text
        assert f"(default: {vars(script)[name]})" in text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "error: a/b: Permission denied"),
        (ConnectionError("the tracker does not answer"), "error: the tracker does not answer"),
        (InputError("what, where"), "error: what, where"),
    ],
)
def test_what_a_person_can_mend_is_one_line(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as done:
        cli.run(main)
    assert done.value.code == line


def test_the_command_ends_in_one_line_and_status_1():
    command = [sys.executable, "finetune_moondream.py", "--epochs", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: EPOCHS must be a whole number, more than 0, not 0"
