"""Looking at pictures: each read once as long as it stays what it is, none decoded before it must be."""

import builtins
import io
import json
import os
import runpy
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile, PngImagePlugin

from moondream2 import modeling_moondream2, pictures
from moondream2.cli import InputError
from moondream2.pictures import (
    CLIPPED,
    CUT,
    FLAT,
    SCALED,
    BrokenPicture,
    KnownPictures,
    Picture,
    PictureError,
    decode,
    examine,
    find_picture,
    find_pictures,
    look,
    pixels_of,
    read_ahead,
    rows_there,
    set_up_pillow,
)
from tests import conftest
from tests.shared import draw_picture


def age(path, seconds=10):
    """Makes a file one that was last changed so many seconds ago."""
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def files(tmp_path):
    """Six pictures that have lain there for a while."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        draw_picture(path, number, (140 + number, 100))
        age(path)
    return paths


@pytest.fixture
def opened(monkeypatch):
    """The names of the pictures that were opened, one for each time."""
    names, opens = [], io.open

    def note(file, *args, **options):
        if str(file).endswith(".png"):
            names.append(Path(file).name)
        return opens(file, *args, **options)

    monkeypatch.setattr(io, "open", note)  # what pathlib opens with
    monkeypatch.setattr(builtins, "open", note)
    return names


@pytest.fixture
def known(tmp_path):
    return KnownPictures(tmp_path / "features")


def test_a_second_start_opens_no_picture(files, known, opened):
    first = known.look_at(files)
    assert sorted(opened) == [file.name for file in files]
    opened.clear()
    again = KnownPictures(known.index.parent).look_at(files)
    assert opened == [] and again == first
    assert again[files[2]] == Picture(files[2], look(files[2]).key, (142, 100))


def test_no_picture_is_decoded(files, known, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture is decoded"))
    assert all(isinstance(picture, Picture) for picture in known.look_at(files).values())


@pytest.mark.parametrize("how", ["size", "time"])
def test_a_changed_picture_is_read_again_and_no_other(files, known, opened, how):
    before, status = known.look_at(files), files[3].stat()
    if how == "size":
        draw_picture(files[3], 50, (999, 100))
        os.utime(files[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        age(files[3], 5)
    opened.clear()
    after = known.look_at(files)
    assert opened == ["3.png"]
    assert (after[files[3]] != before[files[3]]) == (how == "size")
    opened.clear()
    known.look_at(files)
    assert opened == []


def test_the_same_size_and_time_with_other_content_is_taken_for_the_old_one_until_it_is_touched(files, known):
    before, status = known.look_at(files)[files[0]], files[0].stat()
    content = bytearray(files[0].read_bytes())
    content[-20] ^= 1
    files[0].write_bytes(content)
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    taken = known.look_at(files)[files[0]]
    assert taken == before
    with pytest.raises(PictureError, match="the file has changed"):
        pixels_of(taken, lambda image: image)
    age(files[0], 20)
    assert known.look_at(files)[files[0]].key == look(files[0]).key != before.key


def test_a_picture_that_was_just_written_is_read_again(files, known, opened):
    os.utime(files[1])
    known.look_at(files)
    opened.clear()
    known.look_at(files)
    assert opened == ["1.png"]


def test_a_folder_of_another_name_has_other_pictures(files, known, opened, monkeypatch):
    """A relative path is another file in another working directory."""
    monkeypatch.chdir(files[0].parent)
    known.look_at([Path("0.png")])
    monkeypatch.chdir(files[0].parent.parent)
    Path("0.png").write_bytes(files[0].read_bytes())
    age(Path("0.png"))
    opened.clear()
    known.look_at([Path("0.png"), files[0]])
    assert opened == ["0.png"]  # the one here


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1}', b'{"a": [1, 2, "key", 4]}', b'{"a": [1, 2, 3, 4, 5]}'],
)
def test_an_index_that_is_damaged_or_none_counts_as_empty(files, known, opened, content):
    known.index.parent.mkdir()
    known.index.write_bytes(content)
    assert len(known.look_at(files)) == 6
    assert len(opened) == 6
    assert len(json.loads(known.index.read_bytes())) == 6


def test_two_runs_keep_what_each_has_seen(files, known, monkeypatch):
    """The second begins and ends while the first reads."""
    look_first, other = pictures.look, KnownPictures(known.index.parent)

    def look_slowly(path):
        monkeypatch.setattr(pictures, "look", look_first)
        other.look_at(files[:3])
        return look_first(path)

    monkeypatch.setattr(pictures, "look", look_slowly)
    known.look_at(files[5:])
    assert sorted(Path(path).name for path in known.read()) == ["0.png", "1.png", "2.png", "5.png"]


def test_a_pass_that_is_stopped_goes_on_from_there(files, known, opened):
    stops = iter([False, False, False, True])

    def check_stop():
        if next(stops):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        known.look_at(files, check_stop)
    assert 3 <= len(known.read()) <= len(opened)
    assert known.index.exists() and opened
    seen, _ = set(opened), opened.clear()
    known.look_at(files)
    assert not seen & set(opened) and seen | set(opened) == {file.name for file in files}


def test_without_a_folder_nothing_is_kept(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert len(KnownPictures(None).look_at(files)) == 6
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to_costs_only_the_next_start_time(files, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert len(KnownPictures(tmp_path / "file").look_at(files)) == 6
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "the next start reads all pictures again" in out
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_is_no_picture_is_said_at_once_and_what_is_broken_inside_when_it_is_decoded(files, known):
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_text("no picture")
    files[2].write_bytes(b"")
    files[3].unlink()
    Image.new("1", (20_000, 20_000)).save(files[4])
    found = known.look_at(files)
    assert [type(found[file]) for file in files] == [Picture, *[PictureError] * 4, Picture]
    assert "UnidentifiedImageError" in str(found[files[1]]) and "FileNotFoundError" in str(found[files[3]])
    assert [found[file].kind for file in files[1:5]] == [*["picture broken"] * 3, "picture too large"]
    assert all("\n" not in str(found[file]) for file in files[1:5])
    with pytest.raises(BrokenPicture, match="truncated"):
        pixels_of(found[files[0]], lambda image: image.load())


def test_too_many_pixels_for_pillow_to_warn_of_are_too_many(tmp_path, monkeypatch):
    draw_picture(tmp_path / "a.png", 1)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 13_999)
    with pytest.raises(PictureError, match="140 x 100 pixels are more than 13,999"):
        look(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------------------------------
# What every viewer opens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def set_up(monkeypatch):
    """`set_up()` as a run's start does; before it and after the test, Pillow is as it comes."""
    monkeypatch.setattr(Image, "ID", [each for each in Image.ID if "HEI" not in each])
    for name in ("OPEN", "MIME", "EXTENSION"):
        own = getattr(Image, name).items()
        monkeypatch.setattr(Image, name, {key: value for key, value in own if "HEI" not in f"{key} {value}".upper()})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**30 // 12)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)
    with warnings.catch_warnings():
        yield set_up_pillow


def test_importing_the_package_changes_no_setting_of_pillows():
    before, after = conftest.PILLOW
    assert before == after


@pytest.mark.parametrize("what", ["profile", "text", "text behind the pixels"])
def test_a_png_with_more_than_a_megabyte_of_profile_or_text(tmp_path, set_up, what):
    image, chunks, options = Image.new("RGB", (14, 10), "red"), PngImagePlugin.PngInfo(), {}
    if what == "profile":
        options["icc_profile"] = bytes(3 * 2**20)
    else:
        chunks.add_text("comment", "a" * 3 * 2**20, zip=True)
    image.save(tmp_path / "a.png", pnginfo=chunks, **options)
    if what == "text behind the pixels":
        content = (tmp_path / "a.png").read_bytes()
        start, pixels = content.index(b"zTXt") - 4, content.index(b"IDAT") - 4
        end = content.index(b"IEND") - 4
        moved = content[:start] + content[pixels:end] + content[start:pixels] + content[end:]
        (tmp_path / "a.png").write_bytes(moved)
    with pytest.raises(PictureError, match="too large"):
        pixels_of(look(tmp_path / "a.png"), lambda image: image)
    set_up()
    assert pixels_of(look(tmp_path / "a.png"), lambda image: image.getpixel((1, 1))) == (255, 0, 0)


@pytest.fixture
def photo():
    """400 x 300 pixels in which no two places look alike, nor any row or column grey."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), "u1")
    return Image.fromarray(noise).resize((400, 300))


def jpeg(image, mode="RGB", **options):
    image.convert(mode).save(file := io.BytesIO(), "JPEG", quality=85, **options)
    return file.getvalue()


def difference(image, other):
    return np.abs(np.asarray(image, float) - np.asarray(other, float)).mean()


KINDS = [("RGB", {}), ("RGB", {"subsampling": 0}), ("RGB", {"restart_marker_rows": 1}), ("L", {}), ("CMYK", {})]


@pytest.mark.parametrize(("mode", "options"), KINDS, ids=str)
@pytest.mark.parametrize("is_large", [False, True])
def test_of_a_jpeg_without_its_last_bytes_the_rows_there_are_counted(photo, monkeypatch, mode, options, is_large):
    """Against the first that differs from the whole one's: exactly, but where coarser colours blend with the next."""
    is_blended = mode == "RGB" and "subsampling" not in options
    monkeypatch.setattr(modeling_moondream2, "MAX_PIXELS", 10_000 if is_large else 10**6)
    content = jpeg(photo, mode, **options)
    whole, is_cut = decode(content)
    assert not is_cut and whole.size == ((200, 150) if is_large else (400, 300))
    for end in [len(content) - 1, len(content) - 2, *(int(share * len(content)) for share in (0.97, 0.9, 0.5, 0.2))]:
        padded = Image.open(io.BytesIO(content[:end] + b"\xff\xd9"))
        modeling_moondream2.decode_smaller(padded)
        same = (np.asarray(padded) == np.asarray(whole)).reshape(whole.height, -1).all(axis=1)
        there = whole.height if same.all() else int(np.argmin(same))
        assert rows_there(padded, content[:end]) - there in range(19 if is_blended else 1)
        if there >= 0.95 * whole.height:
            image, is_cut = decode(content[:end])
            assert is_cut and difference(image, whole) < 3
        elif there < 0.9 * whole.height:
            with pytest.raises(BrokenPicture, match=r"ends early: \d+% of the picture's rows are there"):
                decode(content[:end])


def test_the_grey_at_the_bottom_of_a_whole_picture_is_not_missing(photo):
    photo.paste((128, 128, 128), (0, 200, 400, 300))
    assert not decode(jpeg(photo))[1]
    with pytest.raises(BrokenPicture, match="70% of"):  # it can't be told from what is missing
        decode(jpeg(photo)[:-2])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_progressive_jpeg_is_whole_as_soon_as_all_its_detail_has_come_once(photo, mode):
    content = jpeg(photo, mode, progressive=True)
    whole, _ = decode(content)
    used = []
    for share in range(5, 100, 5):
        try:
            image, is_cut = decode(content[: len(content) * share // 100])
        except BrokenPicture as error:
            assert not used and "0% of the picture's rows" in str(error)
        else:
            used.append(share)
            assert is_cut and difference(image, whole) < 10
    assert used[0] <= 75 and used[-1] == 95
    coarse = Image.open(io.BytesIO(content[: len(content) // 10] + b"\xff\xd9"))
    assert difference(coarse, whole) > 12  # as what is refused is


@pytest.mark.parametrize(
    ("form", "bytes_cut"), [("PNG", 100), ("GIF", 100), ("TIFF", 100), ("WEBP", 100), ("BMP", 100), ("BMP", 2)]
)
def test_pictures_of_other_forms_without_their_last_bytes_are_broken(tmp_path, photo, form, bytes_cut):
    photo.save(tmp_path / "a", form)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-bytes_cut])
    with pytest.raises(PictureError):
        pixels_of(look(tmp_path / "a"), lambda image: image)


def test_a_jpeg_of_too_many_pixels_is_decoded_at_half_its_size_by_whoever_decodes_it(tmp_path, photo, monkeypatch):
    for module in (pictures, modeling_moondream2):
        monkeypatch.setattr(module, "MAX_PIXELS", 50_000)
    monkeypatch.setattr(pictures, "MAX_JPEG_PIXELS", 200_000)
    (tmp_path / "a.jpg").write_bytes(jpeg(photo))
    picture = look(tmp_path / "a.jpg")
    assert picture.size == (400, 300)
    assert pixels_of(picture, lambda image: image.size) == (200, 150)
    photo.save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="400 x 300 pixels are more than 50,000") as error:
        look(tmp_path / "a.png")
    assert error.value.kind == "picture too large" and not isinstance(error.value, BrokenPicture)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = modeling_moondream2.preprocess(image)  # as a saved model's encode_image does
    assert torch.equal(pixels_of(picture, modeling_moondream2.preprocess), expected)
    monkeypatch.setattr(pictures, "MAX_JPEG_PIXELS", 100_000)
    with pytest.raises(PictureError, match="400 x 300 pixels are more than 100,000"):
        look(tmp_path / "a.jpg")


@pytest.mark.parametrize("size", [(12_000, 9_000), (16_320, 12_240)], ids=["108 megapixels", "200 megapixels"])
def test_a_phones_largest_photo_is_let_through(tmp_path, set_up, size):
    """Only its header is looked at, as its size is in no other place."""
    content = bytearray(jpeg(Image.new("RGB", (16, 16))))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = size[1].to_bytes(2, "big") + size[0].to_bytes(2, "big")
    (tmp_path / "a.jpg").write_bytes(content)
    set_up()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look(tmp_path / "a.jpg").size == size


def test_heic_is_read_where_its_package_is_and_named_where_it_is_not(tmp_path, photo, set_up, known, monkeypatch):
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = 6
    heif = pillow_heif.from_pillow(photo)
    heif.save(tmp_path / "a.heic", quality=90, exif=exif.tobytes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        set_up()
        error = known.look_at([tmp_path / "a.heic"])[tmp_path / "a.heic"]
        assert error.reason("a.heic") == "picture needs a package: a.heic: pip install pillow-heif, which reads HEIC"
        assert not isinstance(error, BrokenPicture)
    set_up()
    found = known.look_at([tmp_path / "a.heic"])[tmp_path / "a.heic"]
    upright = pixels_of(found, modeling_moondream2.upright_rgb)
    (tmp_path / "b.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:50])
    with pytest.raises(PictureError, match="cannot identify") as error:
        look(tmp_path / "b.heic")
    assert error.value.kind == "picture broken"
    assert upright.size == (300, 400) and difference(upright, photo.transpose(Image.Transpose.ROTATE_270)) < 10


# ---------------------------------------------------------------------------------------------------------------------
# What is said of pictures that are used
# ---------------------------------------------------------------------------------------------------------------------

NAN, RAMP = float("nan"), np.linspace(0, 1, 6000).reshape(60, 100)


@pytest.mark.parametrize(
    ("values", "remarks"),
    [
        ((255 * RAMP).astype("u1"), []),
        ((4095 * RAMP).astype("u2"), [SCALED]),
        ((255 * RAMP).astype("i4"), [SCALED]),
        ((255 * RAMP).astype("i4") - 1, [SCALED, CLIPPED]),
        (RAMP.astype("f4"), [SCALED]),
        ((255 * RAMP).astype("f4"), [SCALED]),
        ((256 * RAMP).astype("f4"), [SCALED, CLIPPED]),
        (RAMP.astype("f4") - 0.1, [SCALED, CLIPPED]),
        (np.where(RAMP < 0.5, RAMP, NAN).astype("f4"), [SCALED, CLIPPED]),
        (np.where(RAMP < 0.5, RAMP, np.inf).astype("f4"), [SCALED, CLIPPED]),
        (np.zeros((60, 100), "u2"), [SCALED, FLAT]),
        ((15 * RAMP).astype("u1") + 100, [FLAT]),
        ((17 * RAMP).astype("u1") + 100, []),
        (np.full((60, 100, 3), (255, 0, 0), "u1"), [FLAT]),
        (np.stack([RAMP * 0, RAMP * 0, RAMP * 40], -1).astype("u1"), []),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_said_of_a_pictures_values(tmp_path, values, remarks):
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels, said = examine(look(tmp_path / "a.tif"), modeling_moondream2.preprocess)
    assert said == remarks
    assert torch.equal(pixels, pixels_of(look(tmp_path / "a.tif"), modeling_moondream2.preprocess))


def test_of_a_page_with_one_short_line_nothing_is_said(tmp_path):
    page = Image.new("RGB", (1240, 1754), "white")
    ImageDraw.Draw(page).text((600, 20), "7", fill="black", font_size=24)
    page.save(tmp_path / "page.png")
    assert examine(look(tmp_path / "page.png"), modeling_moondream2.preprocess)[1] == []


def test_of_a_jpeg_that_lacks_its_last_bytes_it_is_said(tmp_path, photo):
    (tmp_path / "a.jpg").write_bytes(jpeg(photo)[:-2])
    assert examine(look(tmp_path / "a.jpg"), modeling_moondream2.preprocess)[1] == [CUT]


def test_a_picture_that_is_gone_or_takes_too_much_memory_is_not_called_broken(files):
    def preprocess(image):
        raise MemoryError

    picture = look(files[0])
    with pytest.raises(PictureError, match="more memory") as error:
        pixels_of(picture, preprocess)
    assert not isinstance(error.value, BrokenPicture)
    files[0].unlink()
    with pytest.raises(PictureError, match="No such file") as error:
        pixels_of(picture, preprocess)
    assert not isinstance(error.value, BrokenPicture)


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        ("images/a b.png", r"images\a b.png"),
        ("images/a b.png", r".\images\a%20b.png"),
        ("images/a b.png", "images/a%20b.png"),
        ("images/é ü.png", "images/%C3%A9%20%C3%BC.png"),
        ("images/\u00e9.png", "images/e\u0301.png"),
        ("images/e\u0301.png", "images/\u00e9.png"),
        ("images/e\u0301 1.png", "images\\\u00e9%201.png"),
        ("a b.png", "~/a b.png"),
        ("a b.png", r"~\a%20b.png"),
        ("a b.png", "file://{folder}/a b.png"),
        ("a b.png", "file://{folder}/a%20b.png"),
        ("a b.png", "FILE://localhost{folder}/a%20b.png"),
        ("a b.png", "file:{folder}/a%20b.png"),
        ("images/a.png", "file://images/a.png"),
    ],
)
def test_a_path_is_found_as_people_and_programs_write_it(tmp_path, monkeypatch, on_disk, written):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / on_disk
    path.parent.mkdir(exist_ok=True)
    draw_picture(path, 1)
    assert find_picture(tmp_path / "train.jsonl", written.format(folder=tmp_path)) == path


def test_a_file_of_the_name_as_it_stands_wins(tmp_path, monkeypatch):
    """Also one in the working directory, where those of another spelling lie beside the JSONL file."""
    monkeypatch.chdir(tmp_path)
    names = {"a%20b.png": "a b.png", r"c\d.png": "c/d.png", "\u00e9.png": "e\u0301.png", "~/f.png": "f.png"}
    for written, other in names.items():
        for path in (tmp_path / written, tmp_path / "data" / other):
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_picture(path, 1)
        assert find_picture(tmp_path / "data" / "train.jsonl", written) == Path(written)
        Path(written).unlink()
        monkeypatch.setenv("HOME", str(tmp_path / "data"))
        assert find_picture(tmp_path / "data" / "train.jsonl", written) == tmp_path / "data" / other
        monkeypatch.delenv("HOME")


BASE64 = "iVBORw0KGgo" + "AAAANSUhEUgAA+/aZ_-" * 10_000 + "=="


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.png", "picture not found: gone.png"),
        ("gone\x1b[2J\r\n\x07.png", "picture not found: gone [2J   .png"),
        ("file:///gone.png", "picture not found: file:///gone.png"),
        ("file:///C:/gone.png", "picture not found: file:///C:/gone.png"),
        ("folder/" * 50_000 + "a.png", f"picture not found: {'folder/' * 5}folde…"),
        ("http://a.org/b.png", "picture is an address, not a path: http://a.org/b.png: download it, and give "),
        ("S3://bucket/b.png", "picture is an address, not a path: S3://bucket/b.png: download it, and give "),
        ("data:image/png;base64,iVBO", "picture is base64, not a path: data:image/png;base64,iVBO: write it to a file"),
        (BASE64, f"picture is base64, not a path: {BASE64[:40]}…{BASE64[-39:]}: write it to a file, and give "),
        (f"data:image/png;base64,{BASE64}", f"picture is base64, not a path: data:image/png;base64,{BASE64[:18]}…"),
    ],
    ids=lambda text: text[:20],
)
def test_why_there_is_no_picture_is_a_short_line(tmp_path, known, name, reason):
    (tmp_path / "there.png").write_text("no picture")
    lines = [SimpleNamespace(source="train.jsonl:1", image_path=each) for each in (name, "there.png", name)]
    told = find_pictures(tmp_path / "train.jsonl", lines[:2], known)[name].reason(name)
    assert told.startswith(reason) and told.isprintable() and len(told) < 200
    with pytest.raises(InputError, match="2 of 3 lines in .* have no picture that is there, such as") as error:
        find_pictures(tmp_path / "train.jsonl", lines, known)
    assert told in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 600


def test_what_the_data_says_reaches_no_terminal_as_it_stands(tmp_path, known):
    name = "a\x1b]0;title\x07" + "b" * 200 + ".png"
    (tmp_path / name).write_text("no picture")
    line = SimpleNamespace(image_path=name)
    told = find_pictures(tmp_path / "train.jsonl", [line], known)[name].reason(name)
    assert told.startswith("picture broken: a ]0;title bbb") and told.isprintable() and len(told) < 350


def test_results_come_in_order_from_several_threads():
    meeting = threading.Barrier(3)  # nobody passes it alone

    def meet(item):
        meeting.wait(60)
        return item, threading.get_ident()

    items, threads = zip(*read_ahead(meet, range(9), threads=3, ahead=6), strict=True)
    assert list(items) == list(range(9)) and len(set(threads)) == 3 and threading.get_ident() not in threads


def test_all_cores_read_and_a_machines_processes_share_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(60)), raising=False)
    for processes, threads in ((1, 32), (4, 15), (64, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert runpy.run_path(pictures.__file__)["THREADS"] == threads


def test_no_more_than_asked_for_is_read_ahead():
    begun = []
    results = read_ahead(begun.append, iter(range(100)), threads=2, ahead=5)
    for number in range(10):
        next(results)
        assert number < len(begun) + 1 <= number + 7
    results.close()


def test_what_is_raised_is_raised_at_its_item():
    results = read_ahead(lambda item: 10 // item, [5, 2, 0, 1], threads=2, ahead=4)
    assert [next(results), next(results)] == [2, 5]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_drops_what_has_not_begun():
    begun, go_on, others = [], threading.Event(), threading.enumerate()

    def work(item):
        begun.append(item)
        assert not item or go_on.wait(60)

    results = read_ahead(work, range(100), threads=1, ahead=50)
    next(results)
    threading.Timer(0.1, go_on.set).start()
    results.close()
    assert len(begun) <= 2  # the first, and the one under way
    begun_here = [thread for thread in threading.enumerate() if thread not in others]
    assert not any(thread.name.startswith("ThreadPoolExecutor") for thread in begun_here)
