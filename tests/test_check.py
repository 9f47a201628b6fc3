"""The look before a run: it says what the run says, what it will take, and ends as the run would, touching nothing."""

import json
import os
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import check
from moondream2.cli import InputError
from moondream2.modeling_moondream2 import MoondreamConfig
from tests.shared import TINY, dataset, write_lines


@pytest.fixture
def flags(data):
    for picture in data.glob("*.png"):
        os.utime(picture, (1e9, 1e9))  # one that was just written is looked at again
    return {
        "model_id": TINY,
        "train_file": data / "train.jsonl",
        "valid_file": data / "valid.jsonl",
        "features_dir": data / "features",
        "output_dir": data / "out",
        "batch_size": 4,
        "epochs": 1,
        "learning_rate": 1e-3,
    }


@pytest.fixture
def run_check(monkeypatch, capsys):
    """`run_check(batch_size=4, ...)` runs `python -m moondream2.check` in this process; returns what it printed."""

    def run(**flags):
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["check.py", *words])
        check.main()
        return capsys.readouterr().out.splitlines()

    return run


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_it_prints_what_the_run_prints_before_it_trains(flags, run_check, run_main, data, capsys):
    broken = [{"image_path": name, "question": "Q", "answer": answer} for name, answer in (("no", "A"), ("0.png", ""))]
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    write_lines(data / "train.jsonl", lines + broken)
    before = files_in(data)
    told = run_check(**flags)
    assert files_in(data) - before <= {"features", "features/known_pictures.json"}
    run_main(**flags)
    ran = capsys.readouterr().out.splitlines()
    own = [line for line in told if line not in ran]
    assert [line.split(" ")[0] for line in own] == ["An", "On", "On", "On", "A"]
    until = ran.index(next(line for line in ran if line.startswith("An optimizer step takes")))
    shared = [line for line in ran[1 : until + 1] if not line.startswith("Encoding")]  # the first is the device's
    assert told[: len(shared)] == shared and "answer empty" in "\n".join(shared)


def test_it_looks_at_a_test_file_and_says_what_judges_without_a_valid_file(
    flags, run_check, test_file, run_main, monkeypatch, capsys
):
    flags |= {"test_file": test_file, "valid_file": "none", "epochs": 1}
    monkeypatch.setattr(check, "GB", 1)
    told = run_check(**flags)
    (features,) = [line for line in told if line.startswith(f"On the disk: up to {10 * 81 * 192 * 2:,}.0 GB in ")]
    assert str(flags["features_dir"]) in features
    assert any(line.startswith("No VALID_FILE: 1 of 8 pictures") for line in told)
    assert "a tenth of train.jsonl" in "\n".join(told) and "test.jsonl" in "\n".join(told)
    run_main(**flags)
    ran = capsys.readouterr().out.splitlines()
    until = told.index(next(line for line in told if line.startswith("Trainable parameters")))
    assert told[:until] == ran[1 : until + 1]
    test_file.write_text("")
    with pytest.raises(InputError, match="test.jsonl has no example that can be used"):
        run_check(**flags | {"overwrite": "true"})


def test_its_positions_are_those_of_the_run(flags, run_check, run_main, monkeypatch):
    """On a card, where rows are padded."""
    said = next(line for line in run_check(**flags) if line.startswith("An epoch has"))
    monkeypatch.setattr(script, "row_multiple", lambda device: 64)
    sizes, backward = [], script.backward

    def noting(engine, batches, *more):
        sizes.extend(batch["document_ids"].numel() for batch in batches if batch["rows"])
        return backward(engine, batches, *more)

    monkeypatch.setattr(script, "backward", noting)
    run_main(**flags)
    examples = len(dataset(flags["train_file"]))
    assert said == (
        f"An epoch has {sum(sizes):,} positions, {sum(sizes) / examples:,.0f} a question; "
        f"a micro-batch {max(sizes):,} at most"
    )


def test_memory_is_docs_memorys(tmp_path, flags, run_check):
    """The released model, from its configuration alone: the table of docs/memory.md has the same figures."""
    config = MoondreamConfig()
    assert check.activation_bytes(config.text_config, 2 * 760, False) == 2 * 760 * 24 * 20_480 * 2
    assert check.activation_bytes(config.text_config, 760, True) == pytest.approx(0.1 * 2**30, rel=0.2)
    for file in TINY.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    released = {"architectures": ["Moondream"], "model_type": "moondream1", "text_config": {"model_type": "phi"}}
    (tmp_path / "config.json").write_text(json.dumps(released))
    lines = run_check(**flags | {"model_id": tmp_path, "output_dir": tmp_path / "out", "features_dir": "none"})
    assert "Trainable parameters: 1,419,333,637 of 1,867,982,709" in lines
    card, disk = lines[-3:-1]
    assert "10.6 for weights, gradients and AdamW" in card
    assert disk.startswith(f"On the disk: up to 22.7 GB in {tmp_path / 'out'}, 3.7 GB after it; ")


def test_what_a_layer_keeps_is_what_autograd_saves():
    """Between two depths of the same model, so that only layers count; rotation keeps its angles besides."""
    saved = []
    for depth in (1, 3):
        model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(TINY).config).bfloat16()
        del model.text_model.transformer.h[depth:]
        total = {}

        def pack(tensor, total=total):
            total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.text_model(inputs_embeds=torch.randn(1, 200, model.config.text_config.hidden_size).bfloat16())
        assert out.logits.requires_grad
        saved.append(sum(size for place, size in total.items() if place not in weights))
    text = model.config.text_config
    expected = check.activation_bytes(text, 200, False) / text.num_hidden_layers * 2
    assert saved[1] - saved[0] == pytest.approx(expected, rel=0.15)


def test_the_disks_room_is_compared(flags, run_check, monkeypatch):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    features, output = [line for line in run_check(**flags) if line.startswith("On the disk")]
    assert features.endswith("0.0 GB are free: that does not fit") and output.endswith("that does not fit")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_file": "gone.jsonl"}, "cannot read gone.jsonl"),
        ({"model_id": "./gone"}, "cannot load ./gone"),
        ({"output_dir": TINY}, "lies in OUTPUT_DIR"),
        ({"batch_size": 0}, "BATCH_SIZE must be greater than 0, not 0"),
        ({"tracker": "trackio"}, "TRACKER 'trackio' needs its package: pip install trackio"),
    ],
)
def test_it_ends_with_the_line_that_the_run_would_end_with(flags, run_check, run_main, change, said):
    messages = []
    for run in (run_check, run_main):
        with pytest.raises(InputError, match=said) as error:
            run(**flags | change)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_what_is_in_output_dir_ends_it_and_stays(flags, run_check, run_main, data):
    mine = data / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("notes")
    with pytest.raises(InputError, match="is not empty"):
        run_check(**flags | {"output_dir": mine})
    assert files_in(mine) == {"notes.txt"}
    run_main(**flags)
    before = files_in(data)
    with pytest.raises(InputError, match="holds a finished model"):
        run_check(**flags)
    assert run_check(**flags | {"overwrite": "true"})[-1] == "A run with these constants would begin."
    assert files_in(data) == before
    (flags["output_dir"] / "README.md").unlink()
    (flags["output_dir"] / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds a finished model"):
        run_check(**flags)
    assert (flags["output_dir"] / "checkpoints").is_dir()


def test_a_run_that_would_go_on_is_told_and_one_of_other_settings_refused(flags, run_check, run_main, monkeypatch):
    def stopped(*arguments):
        raise InputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(script, "finish", stopped)
        with pytest.raises(InputError, match="stopped"):
            run_main(**flags)
    (checkpoint,) = (flags["output_dir"] / "checkpoints").glob("epoch-*")
    assert f"It would go on from {checkpoint}" in run_check(**flags)
    with pytest.raises(InputError, match="is of a run with other settings .SEED was 0, is 1") as error:
        run_check(**flags | {"seed": 1})
    with pytest.raises(InputError, match="TEST_FILE was None, is "):
        run_check(**flags | {"test_file": flags["valid_file"]})
    with pytest.raises(InputError) as other:
        run_main(**flags | {"seed": 1})
    assert str(error.value) == str(other.value)
    assert run_check(**flags | {"seed": 1, "overwrite": "true"})[-1] == "A run with these constants would begin."
    assert checkpoint.is_dir()
