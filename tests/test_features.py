"""The feature store: each picture encoded once, nothing damaged ever used, nothing lost when killed."""

import copy
import errno
import json
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import finetune_moondream as script
from moondream2 import features
from moondream2.features import FeatureStore, encode_pictures
from moondream2.pictures import inspect, pixels_of
from tests.conftest import TINY, dataset, draw_picture, make_run, start_script


@pytest.fixture
def train(data, tokenizer):
    return dataset(data / "train.jsonl", tokenizer)


@pytest.fixture
def store(tiny, tmp_path):
    return FeatureStore(tmp_path / "features", tiny.vision_encoder, (81, tiny.config.text_config.hidden_size))


@pytest.fixture
def encoded(tiny, monkeypatch):
    """How many pictures went through the vision encoder, call by call."""
    calls = []
    tiny.vision_encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def test_each_picture_is_encoded_once_and_never_again(tiny, train, store, encoded):
    pictures = list(train.pictures.values())
    assert encode_pictures(pictures, tiny.vision_encoder, store, show=False)
    assert sum(encoded) == len(pictures)
    for picture in pictures:
        with torch.no_grad():
            expected = tiny.vision_encoder([pixels_of(picture, tiny.vision_encoder)])[0]
        torch.testing.assert_close(store.load(picture.key), expected, atol=1e-5, rtol=1e-5)
    encoded.clear()
    again = FeatureStore(store.folder.parent, tiny.vision_encoder, store.shape)
    assert encode_pictures(pictures, tiny.vision_encoder, again, show=False)
    assert encoded == []


def test_a_changed_picture_or_encoder_is_encoded_anew(tiny, train, store):
    pictures = list(train.pictures.values())
    encode_pictures(pictures, tiny.vision_encoder, store, show=False)
    draw_picture(pictures[0].path, 77)
    encode_pictures([inspect(pictures[0].path), *pictures[1:]], tiny.vision_encoder, store, show=False)
    assert store.load(inspect(pictures[0].path).key) is not None
    assert store.load(pictures[0].key) is not None  # the old picture's stay for whoever still has it
    with torch.no_grad():
        tiny.vision_encoder.projection.mlp.fc2.bias[0] += 1
    other = FeatureStore(store.folder.parent, tiny.vision_encoder, store.shape)
    assert other.folder != store.folder and other.load(pictures[1].key) is None


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:-100]
    elif how == "flipped":
        content[-50] ^= 1
    elif how == "empty":
        content = b""
    elif how == "noise":
        content[:] = bytes(len(content))
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "noise"])
def test_a_damaged_entry_is_found_and_made_again(tiny, tokenizer, train, store, encoded, how):
    encode_pictures(list(train.pictures.values()), tiny.vision_encoder, store, show=False)
    example = train[0]
    whole = store.load(example.picture).clone()
    damage(store.path(example.picture), how)
    assert store.load(example.picture) is None
    encoded.clear()
    collate = script.Collator(tiny, tokenizer, store, train.pictures)
    embeds = script.image_embeds(collate([example]), tiny.vision_encoder, store, "cpu")
    torch.testing.assert_close(embeds[0], whole, atol=1e-5, rtol=1e-5)
    assert encoded == [1]
    assert store.load(example.picture) is not None


@pytest.mark.parametrize(("at", "left"), [(4, 5), (7, 2)], ids=["in the second chunk", "in the last"])
def test_a_killed_pass_goes_on_with_the_same_bits(tiny, train, store, encoded, monkeypatch, tmp_path, at, left):
    monkeypatch.setattr(features, "CHUNK", 3)
    tiny.bfloat16()
    pictures = list(train.pictures.values())
    shape = store.shape
    whole = FeatureStore(tmp_path / "whole", tiny.vision_encoder, shape)
    encode_pictures(pictures, tiny.vision_encoder, whole, show=False)
    cut = FeatureStore(tmp_path / "cut", tiny.vision_encoder, shape)
    saved, save = [], cut.save

    def save_some(key, tensor):
        if len(saved) == at:
            raise KeyboardInterrupt
        saved.append(key)
        save(key, tensor)

    cut.save = save_some
    with pytest.raises(KeyboardInterrupt):
        encode_pictures(pictures, tiny.vision_encoder, cut, show=False)
    cut.save = save
    encoded.clear()
    encode_pictures(pictures, tiny.vision_encoder, cut, show=False)
    assert sum(encoded) == left  # of 8 pictures in chunks of 3, those before were whole
    for picture in pictures:
        assert torch.equal(cut.load(picture.key), whole.load(picture.key))


def test_the_encoder_set_aside_is_the_same_and_lies_on_disk(tiny, train, store, tmp_path):
    expected = copy.deepcopy(tiny.vision_encoder.state_dict())
    in_memory = weakref.ref(tiny.vision_encoder.projection.mlp.fc1.weight)
    picture = next(iter(train.pictures.values()))
    encode_pictures([picture], tiny.vision_encoder, store, show=False)
    assert not store.has_encoder()
    store.keep_encoder(tiny.vision_encoder)
    assert store.has_encoder()
    damage(store.encoder, "flipped")
    assert not store.has_encoder()
    store.keep_encoder(tiny.vision_encoder)
    store.set_aside(tiny.vision_encoder)
    for name, tensor in tiny.vision_encoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert in_memory() is None and str(store.encoder) in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        again = tiny.vision_encoder([pixels_of(picture, tiny.vision_encoder)])[0]
    torch.testing.assert_close(again, store.load(picture.key), atol=1e-6, rtol=1e-6)


def test_without_room_pictures_are_encoded_on_the_fly(tiny, tokenizer, train, store, monkeypatch, capsys):
    usage = shutil.disk_usage(store.folder.parents[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert not encode_pictures(list(train.pictures.values()), tiny.vision_encoder, store)
    out = capsys.readouterr().out
    assert "Encoding 8 pictures" in out and "does not fit" in out
    assert not list(store.folder.rglob("*.safetensors"))


def test_the_disk_it_takes_is_said_before(tiny, train, store, capsys):
    encode_pictures(list(train.pictures.values()), tiny.vision_encoder, store)
    said = capsys.readouterr().out
    store.keep_encoder(tiny.vision_encoder)
    on_disk = sum(file.stat().st_size for file in store.folder.rglob("*.safetensors"))
    assert on_disk > 3_500_000 and f"({on_disk / 1e9:.3f} GB, " in said


def test_worker_processes_decode_as_the_main_one_does(tiny, train, store, tmp_path):
    pictures = list(train.pictures.values())
    encode_pictures(pictures, tiny.vision_encoder, store, show=False)
    other = FeatureStore(tmp_path / "other", tiny.vision_encoder, store.shape)
    encode_pictures(pictures, tiny.vision_encoder, other, workers=2, show=False)
    assert all(torch.equal(other.load(p.key), store.load(p.key)) for p in pictures)


def test_a_picture_that_breaks_in_the_run_is_named_and_left_out(data, tiny, tokenizer, train, capsys):
    valid = dataset(data / "valid.jsonl", tokenizer)
    Path(train.pictures[train[1].picture].path).write_bytes(b"broken")  # has 4 questions
    draw_picture(train.pictures[train[0].picture].path, 99)  # has 1, and is another picture now
    run = make_run(tiny, tokenizer, train, valid, batch_size=4)
    script.train_epoch(run)
    out = capsys.readouterr().err
    assert len(run.progress.left_out) == 5
    for number in range(1, 6):
        assert out.count(f"left out {data}/train.jsonl:{number}: picture broken") == 1
    assert run.progress.tokens == sum(len(example.answer_ids) for example in train.examples[5:])


def is_mapped():
    return "/encoder.safetensors" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("how", ["kept", "full disk", "no room", "none"])
def test_a_run_trains_without_its_encoder_in_memory(data, run_main, tmp_path, monkeypatch, capsys, how):
    mapped, train_epoch = [], script.train_epoch
    monkeypatch.setattr(script, "train_epoch", lambda run: (mapped.append(is_mapped()), train_epoch(run)))
    if how == "full disk":
        monkeypatch.setattr(features, "save_file", save_unless_large)
    if how == "no room":
        monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    folder = "none" if how == "none" else tmp_path / "features"
    flags = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl"}
    run_main(**flags, features_dir=folder, output_dir=tmp_path / "out", epochs=1, batch_size=8, valid_answers=2)
    assert mapped == [how == "kept"]
    said = "encoder.safetensors: No space left on device: the vision encoder stays in memory"
    out = capsys.readouterr().out
    assert (said in out) == (how == "full disk")
    assert out.count("That does not fit") == (how == "no room")


def test_without_room_for_more_what_is_stored_is_used(data, run_main, tmp_path, monkeypatch):
    """One picture of eleven changes, and there is no room for it: it alone is encoded, in each of its micro-batches."""
    flags = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl", "epochs": 2}
    flags |= {"batch_size": 8, "valid_answers": 0, "features_dir": tmp_path / "features", "group_by_picture": "true"}
    run_main(**flags, output_dir=tmp_path / "one")
    draw_picture(data / "0.png", 77)  # of train.jsonl, with one question
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*") if path.is_file()}
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    calls = count_encoded(monkeypatch)
    run_main(**flags, output_dir=tmp_path / "two")
    assert calls == [1, 1]
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*") if path.is_file()}


def test_a_folder_for_features_that_cannot_be_made_is_named(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl"}
    run = start_script({**flags, "output_dir": tmp_path / "out", "features_dir": tmp_path / "file"})
    error = run.communicate()[1].strip().splitlines()[-1]
    assert run.returncode == 1
    assert error.startswith(f"error: {tmp_path / 'file'}/") and error.endswith(": Not a directory")


def save_unless_large(weights, path, **more):
    if len(weights) > 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_file(weights, path, **more)


def test_two_runs_at_once_may_share_the_folder(data, tmp_path):
    flags = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl", "epochs": 1}
    flags |= {"batch_size": 8, "valid_answers": 0, "features_dir": tmp_path / "features"}
    runs = [start_script({**flags, "output_dir": tmp_path / name}) for name in ("one", "two")]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    logs = [(tmp_path / name / "training_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    first, second = (json.loads(log[-1]) for log in logs)
    assert first["train_loss"] == second["train_loss"] and first["valid_loss"] == second["valid_loss"]
    files = [path.name for path in (tmp_path / "features").rglob("*") if path.is_file()]
    assert len(files) == 11 + 1 and not any(name.endswith(".part") for name in files)


def test_what_a_killed_run_left_half_written_is_removed_in_time(tiny, train, store):
    store.folder.mkdir(parents=True)
    old, new = store.folder / ".old.0123.part", store.folder / ".new.4567.part"
    for part in (old, new):
        part.write_bytes(b"half")
    for _ in range(2):  # pictures are missing, none is missing
        os.utime(old, (0, 0))
        encode_pictures(list(train.pictures.values()), tiny.vision_encoder, store, show=False)
        assert not old.exists() and new.exists()
        old.write_bytes(b"half")


def count_encoded(monkeypatch):
    """How many pictures go through the vision encoders of runs, call by call."""
    calls, load = [], script.load_model

    def load_and_count(*args):
        model = load(*args)
        model.vision_encoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
        return model

    monkeypatch.setattr(script, "load_model", load_and_count)
    return calls


def test_a_run_encodes_each_picture_once(data, run_main, tmp_path, monkeypatch):
    calls = count_encoded(monkeypatch)
    flags = {
        "model_id": TINY,
        "train_file": data / "train.jsonl",
        "valid_file": data / "valid.jsonl",
        "features_dir": tmp_path / "features",
        "batch_size": 4,
        "epochs": 2,
        "valid_answers": 2,
    }
    run_main(output_dir=tmp_path / "one", **flags)
    assert sum(calls) == 11
    calls.clear()
    run_main(output_dir=tmp_path / "two", learning_rate=1e-4, **flags)
    assert calls == []
    flags["features_dir"] = "none"
    run_main(output_dir=tmp_path / "three", **flags)
    assert sum(calls) > 11
    logs = [(tmp_path / name / "training_log.jsonl").read_text().splitlines() for name in ("one", "three")]
    first, third = (json.loads(log[-1])["valid_loss"] for log in logs)
    assert first == pytest.approx(third, rel=0.02)  # bfloat16: other batches of pictures, other roundings
