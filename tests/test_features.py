"""The feature store: each picture encoded once, nothing damaged ever used, nothing lost when killed."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoModelForCausalLM

from moondream2 import features
from moondream2.cli import InputError
from moondream2.features import FeatureStore, image_embeds, keep_features
from moondream2.modeling_moondream2 import PIXELS_VERSION, preprocess
from moondream2.pictures import CLIPPED, CUT, FLAT, SCALED, PictureError, examine, look, pixels_of, read_ahead
from moondream2.rows import lay_out
from tests.child import Child, Children
from tests.shared import TINY, draw_picture


@pytest.fixture
def pictures(data):
    """Those of the small training data, 8 of them."""
    return [look(data / f"{number}.png") for number in range(8)]


@pytest.fixture
def store(tiny, tmp_path):
    return FeatureStore(tmp_path / "features", tiny)


@pytest.fixture
def keep_and_tell(tiny):
    """`keep_and_tell(pictures, store)` as a run of one process does it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    return lambda pictures, store, together=iter: keep_features(
        [{picture.key: picture for picture in pictures}], tiny.vision_encoder, store, accelerator, together
    )


@pytest.fixture
def keep(keep_and_tell):
    """`keep(pictures, store)`, which returns those that can't be used."""
    return lambda *arguments: keep_and_tell(*arguments)[0]


@pytest.fixture
def encoded(tiny):
    """How many pictures went through the vision encoder, call by call."""
    calls = []
    tiny.vision_encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that were decoded, one for each time."""
    names = []

    def noting(decode):
        return lambda picture, preprocess: (names.append(picture.path.name), decode(picture, preprocess))[1]

    for decode in (pixels_of, examine):
        monkeypatch.setattr(features, decode.__name__, noting(decode))
    return names


def expected(tiny, picture):
    return tiny.encode_image([pixels_of(picture, tiny.vision_encoder.preprocess)])[0]


def on_disk(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def cut(picture):
    """The picture, its file cut in the middle: it begins as one, and can't be decoded."""
    picture.path.write_bytes(picture.path.read_bytes()[:-100])
    return look(picture.path)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and storing
# ---------------------------------------------------------------------------------------------------------------------


def test_each_picture_is_encoded_once_and_never_again(tiny, pictures, store, keep, encoded, decoded):
    assert keep(pictures, store) == {}
    assert sum(encoded) == len(decoded) == len(pictures)
    for picture in pictures:
        torch.testing.assert_close(store.load(picture.key), expected(tiny, picture), atol=1e-5, rtol=1e-5)
    encoded.clear()
    decoded.clear()
    assert keep(pictures, FeatureStore(store.folder.parent, tiny)) == {}
    assert encoded == decoded == []


def test_a_changed_picture_is_encoded_anew(pictures, store, keep):
    keep(pictures, store)
    draw_picture(pictures[0].path, 77)
    changed = look(pictures[0].path)
    keep([changed, *pictures[1:]], store)
    assert changed.key in store
    assert pictures[0].key in store  # the old picture's stay for whoever still has it


def change_weights(model):
    with torch.no_grad():
        model.vision_encoder.projection.mlp.fc2.bias[0] += 1


def change_pixels_version(model):
    features.PIXELS_VERSION += 1


@pytest.mark.parametrize(
    "change",
    [
        change_weights,
        change_pixels_version,
        lambda model: model.bfloat16(),
        lambda model: setattr(model.config.vision_config, "tile_from", 256),
        lambda model: model.config.leave_out_tiles(),
        lambda model: setattr(model.config.vision_config, "num_attention_heads", 2),
        lambda model: setattr(model.config.vision_config, "layer_norm_eps", 1e-6),
    ],
    ids=["weights", "preprocessing", "dtype", "tiles", "no tiles", "heads", "eps"],
)
def test_all_that_decides_features_is_in_the_name_of_their_store(tiny, store, monkeypatch, change):
    monkeypatch.setattr(features, "PIXELS_VERSION", PIXELS_VERSION)
    assert FeatureStore(store.folder.parent, tiny).folder == store.folder
    tiny.config.text_config.num_hidden_layers = 1  # decides nothing
    assert FeatureStore(store.folder.parent, tiny).folder == store.folder
    change(tiny)
    assert FeatureStore(store.folder.parent, tiny).folder != store.folder


def test_the_version_of_pixels_is_raised_when_they_change():
    """Where this fails because preprocess() gives other pixels now, raise PIXELS_VERSION and enter their hash."""
    noise, digest = np.random.default_rng(0), hashlib.sha256()
    for shape, kind in [((480, 640, 3), "u1"), ((70, 100, 3), "u1"), ((700, 300, 4), "u1"), ((400, 500), "u2")]:
        image = Image.fromarray(noise.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True))
        image.getexif()[0x0112] = 6  # the camera was turned
        digest.update(preprocess(image).contiguous().numpy())
    for values in (noise.integers(0, 4096, (90, 60), "u2"), noise.random((50, 70), "f4")):
        digest.update(preprocess(Image.fromarray(values)).contiguous().numpy())
    assert {PIXELS_VERSION: digest.hexdigest()[:16]} == {2: "6992892100f44fe0"}


@pytest.mark.parametrize(("at", "left"), [(4, 5), (7, 2)], ids=["in the second chunk", "in the last"])
def test_a_killed_pass_goes_on_with_the_same_bits(tiny, pictures, keep, encoded, monkeypatch, tmp_path, at, left):
    monkeypatch.setattr(features, "CHUNK", 3)
    tiny.bfloat16()
    whole, half = (FeatureStore(tmp_path / name, tiny) for name in ("whole", "half"))
    keep(pictures, whole)
    saved, save = [], half.save

    def save_some(key, tensor):
        if len(saved) == at:
            raise KeyboardInterrupt
        saved.append(key)
        save(key, tensor)

    half.save = save_some
    with pytest.raises(KeyboardInterrupt):
        keep(pictures, half)
    half.save = save
    encoded.clear()
    keep(pictures, half)
    assert sum(encoded) == left  # of 8 pictures in chunks of 3, those before were whole
    for picture in pictures:
        assert torch.equal(half.load(picture.key), whole.load(picture.key))


def test_a_pass_that_is_asked_to_stop_does_between_chunks(pictures, store, keep, encoded, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 3)

    def stopped_after_one(chunks):
        yield next(iter(chunks))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        keep(pictures, store, stopped_after_one)
    assert encoded == [3] and sum(picture.key in store for picture in pictures) == 3


def test_the_disk_it_takes_is_said_before(pictures, store, keep, capsys):
    keep(pictures, store)
    said, size = capsys.readouterr().out, sum(path.stat().st_size for path in on_disk(store.folder))
    assert f"Encoding 8 pictures into {store.folder} ({size / 1e9:.3f} GB, " in said
    keep(pictures, store)
    assert capsys.readouterr().out == ""


def test_once_all_is_stored_the_encoder_leaves_the_device(tiny, pictures, store, keep, monkeypatch, full_disk, capsys):
    moved = []
    monkeypatch.setattr(tiny.vision_encoder, "to", moved.append)
    keep(pictures, store)
    keep(pictures, FeatureStore(None, tiny))
    assert moved == []
    assert capsys.readouterr().out.count("That does not fit") == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    keep(pictures, store)
    assert moved == ["cpu"]


def test_a_full_disk_is_said_in_one_line(pictures, store, keep, monkeypatch):
    def save_file(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(features, "save_file", save_file)
    with pytest.raises(InputError, match=r"cannot write .*\.safetensors: No space left on device$"):
        keep(pictures, store)
    assert not on_disk(store.folder)


def test_stores_of_other_models_are_listed_and_left_alone(tiny, pictures, store, keep, capsys):
    old, own = store.folder.parent / "0123456789abcdef", store.folder.parent / "photos"
    for folder in (old / "00", own):
        folder.mkdir(parents=True)
        (folder / "file.safetensors").write_bytes(bytes(2_500_000))
    before = on_disk(store.folder.parent)
    for _ in range(2):
        keep(pictures, store)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "delete" in line]
        assert line.startswith(f"{old} (0.003 GB) is of another model")
    assert before.items() <= on_disk(store.folder.parent).items()
    keep(pictures, FeatureStore(None, tiny))
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that can't be used
# ---------------------------------------------------------------------------------------------------------------------


def test_a_broken_picture_is_found_once_and_known_from_then_on(pictures, store, keep, encoded, decoded, monkeypatch):
    pictures[2] = cut(pictures[2])
    found = keep(pictures, store)
    assert list(found) == [pictures[2].key] and "truncated" in found[pictures[2].key]
    assert sum(encoded) == 7 and decoded.count("2.png") == 1
    before = on_disk(store.folder)
    decoded.clear()
    assert keep(pictures, store) == found
    assert decoded == [] and on_disk(store.folder) == before
    monkeypatch.setattr(features.PIL, "__version__", "99.0.0")  # which may decode it
    assert keep(pictures, store) == found
    assert "2.png" in decoded


def test_what_is_known_to_be_broken_takes_no_room(pictures, store, keep, capsys):
    pictures[2] = cut(pictures[2])
    keep(pictures, store)
    capsys.readouterr()
    keep(pictures, store)
    assert capsys.readouterr().out == ""


def test_a_picture_that_is_gone_or_changed_is_tried_again_at_the_next_start(pictures, store, keep, decoded):
    kept = pictures[0].path.read_bytes()
    pictures[0].path.unlink()
    draw_picture(pictures[1].path, 55)
    found = keep(pictures, store)
    assert list(found) == [pictures[0].key, pictures[1].key]
    assert "No such file" in found[pictures[0].key] and "has changed" in found[pictures[1].key]
    assert decoded.count("0.png") == decoded.count("1.png") == 1
    pictures[0].path.write_bytes(kept)
    assert list(keep(pictures, store)) == [pictures[1].key]
    assert pictures[0].key in store


@pytest.mark.parametrize("where", ["nowhere", "no room"])
def test_without_kept_features_each_picture_is_decoded_once(tiny, pictures, keep, decoded, full_disk, tmp_path, where):
    store = FeatureStore(None if where == "nowhere" else tmp_path / "features", tiny)
    pictures[2] = cut(pictures[2])
    found = keep(pictures, store)
    assert list(found) == [pictures[2].key] and "truncated" in found[pictures[2].key]
    assert sorted(decoded) == [f"{number}.png" for number in range(8)]
    assert not on_disk(tmp_path / "features")


def test_without_room_for_more_what_is_stored_is_used(tiny, pictures, store, keep, encoded, decoded, monkeypatch):
    keep(pictures[:5], store)
    before = on_disk(store.folder)
    encoded.clear()
    decoded.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert keep(pictures, store) == {}
    assert encoded == [] and sorted(decoded) == ["5.png", "6.png", "7.png"]
    decoded.clear()
    embeds = image_embeds([store.read(picture) for picture in pictures], tiny.vision_encoder, "cpu")
    assert encoded == [3] and sorted(decoded) == ["5.png", "6.png", "7.png"]
    for row, picture in zip(embeds, pictures, strict=True):
        torch.testing.assert_close(row, expected(tiny, picture), atol=1e-5, rtol=1e-5)
    assert on_disk(store.folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of which something is to be said
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(pictures):
    """The pictures, four of them as broken exports and transfers leave them; and what is to be said of these by key."""
    ramp = np.linspace(0, 1, 6000).reshape(60, 100)
    Image.fromarray((4095 * ramp).astype("u2")).save(pictures[0].path)
    Image.fromarray((300 * ramp).astype("f4") - 1).save(pictures[1].path, "TIFF")
    Image.fromarray((15 * ramp).astype("u1")).save(pictures[2].path)
    Image.fromarray((255 * ramp).astype("u1")).save(pictures[3].path, "JPEG")
    pictures[3].path.write_bytes(pictures[3].path.read_bytes()[:-2])
    pictures = [look(picture.path) for picture in pictures]
    remarks = [[SCALED], [SCALED, CLIPPED], [FLAT], [CUT]]
    return pictures, {picture.key: said for picture, said in zip(pictures[:4], remarks, strict=True)}


def test_what_is_to_be_said_of_a_picture_is_found_once_and_known_from_then_on(tiny, odd, store, keep_and_tell, decoded):
    pictures, remarks = odd
    assert keep_and_tell(pictures, store) == ({}, remarks)
    assert sorted(decoded) == sorted(picture.path.name for picture in pictures)
    decoded.clear()
    before = on_disk(store.folder)
    assert len(before) == 8 + 4  # nothing beside those of which there is nothing to say
    assert keep_and_tell(pictures, FeatureStore(store.folder.parent, tiny)) == ({}, remarks)
    assert decoded == [] and on_disk(store.folder) == before


@pytest.mark.parametrize("where", ["nowhere", "no room"])
def test_without_kept_features_it_is_found_as_well(tiny, odd, keep_and_tell, decoded, full_disk, tmp_path, where):
    pictures, remarks = odd
    store = FeatureStore(None if where == "nowhere" else tmp_path / "features", tiny)
    assert keep_and_tell(pictures, store) == ({}, remarks)
    assert len(decoded) == 8 and not on_disk(tmp_path / "features")


def test_it_is_said_of_those_stored_and_of_those_for_which_there_is_no_room(odd, store, keep_and_tell, monkeypatch):
    pictures, remarks = odd
    keep_and_tell(pictures[:2], store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert keep_and_tell(pictures, store) == ({}, remarks)


def test_it_is_stored_before_the_features(odd, store, keep_and_tell, monkeypatch):
    """Where a killed run had these alone, no run would ever look at the picture again."""
    pictures, remarks = odd
    monkeypatch.setattr(store, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        keep_and_tell(pictures, store)
    assert {picture.key: store.remarks(picture.key) for picture in pictures[:4]} == remarks


def test_a_store_whose_remarks_are_damaged_is_used(odd, store, keep_and_tell):
    pictures, remarks = odd
    keep_and_tell(pictures, store)
    store.remarks_path(pictures[0].key).write_bytes(b"\xff\xfe")
    assert keep_and_tell(pictures, store)[1].keys() == remarks.keys() - {pictures[0].key}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


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
def test_a_damaged_entry_is_never_used_and_made_again_by_the_next_start(tiny, pictures, store, keep, encoded, how):
    keep(pictures, store)
    whole = store.load(pictures[0].key).clone()
    damage(store.path(pictures[0].key), how)
    encoded.clear()
    read = store.read(pictures[0])
    assert read[0] is None
    torch.testing.assert_close(image_embeds([read], tiny.vision_encoder, "cpu")[0], whole, atol=1e-5, rtol=1e-5)
    assert encoded == [1] and pictures[0].key not in store
    keep(pictures, store)
    assert torch.equal(store.load(pictures[0].key), whole)


def test_stored_features_are_read_without_the_picture_or_the_encoder(tiny, pictures, store, keep, encoded):
    keep(pictures, store)
    encoded.clear()
    for picture in pictures:
        picture.path.unlink()
    reads = [store.read(picture) for picture in pictures]
    assert Path("/proc/self/maps").read_text().count(str(store.folder)) >= 8  # they take no memory of their own
    embeds = image_embeds(reads, tiny.vision_encoder, "cpu")
    assert embeds.shape == (8, *store.shape) and encoded == [] and not embeds.requires_grad
    assert image_embeds([], tiny.vision_encoder, "cpu") is None


def test_a_picture_that_breaks_during_the_run_is_an_error_of_its_own(pictures, store):
    pictures[0].path.write_bytes(b"broken")
    pictures[1].path.unlink()
    for picture, why in zip(pictures[:2], ("has changed", "No such file"), strict=True):
        with pytest.raises(PictureError, match=why):
            store.read(picture)


def test_reading_and_encoding_on_the_fly_write_nothing(tiny, pictures, store, tmp_path):
    before = on_disk(tmp_path)
    image_embeds([store.read(picture) for picture in pictures], tiny.vision_encoder, "cpu")
    assert on_disk(tmp_path) == before


def test_for_a_gpu_what_is_read_is_pinned_by_whoever_reads(pictures, store, keep, monkeypatch):
    """And lies there as it is to lie on the card: else torch copies it once more, to where it is not pinned."""
    pinned = []

    def pin(tensor):
        assert tensor.is_contiguous()
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    keep(pictures[:1], store)
    store.is_pinned = True
    (features, _), (_, pixels) = map(store.read, pictures[:2])
    assert pinned == [features.shape, pixels.shape]
    pinned.clear()
    layout = lay_out([], {}, store, bos=0, image_tokens=0)
    tensors = [each.shape for each in layout.values() if isinstance(each, torch.Tensor)]
    assert pinned == tensors and len(tensors) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def in_little_shared_memory(folder):
    """Reads the folder's pictures, first as features that are kept, then without, where /dev/shm holds 64 kB."""
    mounts_of_its_own = 0x20000  # CLONE_NEWNS of <sched.h>; os.unshare is of Python 3.12
    assert ctypes.CDLL(None).unshare(mounts_of_its_own) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)
    memory = os.statvfs("/dev/shm")
    assert memory.f_blocks * memory.f_frsize <= 65536
    model = AutoModelForCausalLM.from_pretrained(TINY)
    read = [look(path) for path in sorted(folder.glob("*.png"))]
    for store in FeatureStore(folder / "features", model), FeatureStore(None, model):
        if store.folder:
            assert features.encode_pictures([read], model.vision_encoder, store, show=False) == {}
        embeds = image_embeds(list(read_ahead(store.read, read, threads=4)), model.vision_encoder, "cpu")
        print("embeddings of", len(embeds), flush=True)


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="no right to mount",
)
def test_little_shared_memory_is_enough(data, tmp_path):
    """A container has 64 MB by default; here it is 64 kB, less than one picture's pixels."""
    child = Child(partial(in_little_shared_memory, data), tmp_path / "out.txt")
    assert child.wait() == 0, child.text()  # without any, workers hang
    assert child.text().count("embeddings of 11\n") == 2


def keep_twice(folder):
    """What one of two processes finds in a folder's pictures, and decodes: first with features kept, then without."""
    features.CHUNK = 2
    decoded, load = [], features.examine
    features.examine = lambda picture, use: (decoded.append(picture.path.name), load(picture, use))[1]
    model, accelerator = AutoModelForCausalLM.from_pretrained(TINY), Accelerator(cpu=True)
    pictures = [look(path) for path in sorted(folder.glob("*.png"))]
    pictures = {picture.key: picture for picture in pictures}
    for kept in folder / "features", None:
        store = FeatureStore(kept, model)
        unusable, remarks = features.keep_features([pictures], model.vision_encoder, store, accelerator, iter)
        print(json.dumps([[sorted(unusable), remarks], decoded]), flush=True)
        decoded.clear()
    accelerator.end_training()


def test_two_processes_share_the_work_and_know_the_same(data, pictures, tmp_path):
    broken = [cut(pictures[1]).key, cut(pictures[6]).key]  # found by one each
    for picture in (pictures[0], pictures[7]):  # and these too
        Image.new("RGB", (20, 10), "red" if picture is pictures[0] else "blue").save(picture.path)
    flat = {look(picture.path).key: [FLAT] for picture in (pictures[0], pictures[7])}
    children = Children(2, partial(keep_twice, data), tmp_path)
    assert children.wait() == [0, 0], children[0].text()
    said = [child.text().splitlines() for child in children]
    results = [[json.loads(line) for line in lines if line.startswith("[[[")] for lines in said]
    names = sorted(f"{number}.png" for number in range(11))
    for (first, by_first), (second, by_second) in zip(*results, strict=True):  # kept, then not
        assert first == second == [sorted(broken), flat]
        assert by_first and by_second and sorted(by_first + by_second) == names
    assert ["Encoding 11" in "".join(lines) for lines in said] == [True, False]


def flags_of(data, tmp_path, **flags):
    files = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl"}
    return {**files, "features_dir": tmp_path / "features", "epochs": 1, "batch_size": 8, "valid_answers": 0, **flags}


def test_a_folder_for_features_that_cannot_be_made_is_named(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = flags_of(data, tmp_path, features_dir=tmp_path / "file", output_dir=tmp_path / "out")
    child = Child(flags, tmp_path / "printed")
    assert child.wait() == 1
    error = child.text().strip().splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'file'}/") and error.endswith(": Not a directory")


def test_two_runs_at_once_may_share_the_folder(data, tmp_path):
    names = "one", "two"
    runs = [Child(flags_of(data, tmp_path, output_dir=tmp_path / name), tmp_path / f"{name}.txt") for name in names]
    assert [run.wait() for run in runs] == [0, 0], [run.text() for run in runs]
    logs = [(tmp_path / name / "training_log.jsonl").read_text().splitlines() for name in names]
    first, second = (json.loads(log[-1]) for log in logs)
    assert first["train_loss"] == second["train_loss"] and first["valid_loss"] == second["valid_loss"]
    files = [path.name for path in on_disk(tmp_path / "features") if path.suffix == ".safetensors"]
    assert len(files) == 11 and not list((tmp_path / "features").rglob("*.part"))


# ---------------------------------------------------------------------------------------------------------------------
# Failures in the writer's thread, and what a GPU decides
# ---------------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_in_the_writers_thread_ends_the_pass(pictures, store, keep, monkeypatch):
    """Also one of the first chunk, while those behind it are written."""
    monkeypatch.setattr(features, "CHUNK", 3)
    save, fails = store.save, iter([True])

    def save_or_fail(key, tensor):
        if next(fails, False):
            raise InputError("cannot write")
        save(key, tensor)

    monkeypatch.setattr(store, "save", save_or_fail)
    with pytest.raises(InputError, match="cannot write"):
        keep(pictures, store)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_gpu_copies_from_pinned_memory_while_python_goes_on(tiny, pictures, store, keep, monkeypatch, is_gpu):
    """Other devices may not keep what they copy from until they have."""
    keep(pictures[:1], store)
    waits, to = [], torch.Tensor.to

    def copy(self, device, *more, non_blocking=False):
        waits.append(not non_blocking)
        return to(self, "cpu", *more)

    monkeypatch.setattr(torch.Tensor, "is_cuda", is_gpu, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    assert FeatureStore(store.folder.parent, tiny).is_pinned is is_gpu
    reads = [store.read(picture) for picture in pictures[:2]]
    monkeypatch.setattr(torch.Tensor, "to", copy)
    image_embeds(reads, tiny.vision_encoder, "cuda" if is_gpu else "cpu")
    assert waits == [not is_gpu] * 3  # the pixels of one, then the features of both
