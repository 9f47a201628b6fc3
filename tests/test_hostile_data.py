"""Data as nobody would write it: each ends in a trained example or in one clear line.

HOSTILE_EXAMPLES sets how many cases each property is tried on.
"""

import io
import json
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from moondream2.cli import InputError
from moondream2.modeling_moondream2 import preprocess
from moondream2.pictures import PictureError, look, pixels_of
from tests.shared import dataset, draw_picture

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", 150))
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)

texts = st.text(st.characters(), max_size=30)  # lone surrogates, null characters and all
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts, lambda x: st.lists(x) | st.dictionaries(texts, x)
)
paths = st.sampled_from(
    [
        "a.png",
        "./a.png",
        "../a.png",
        "a.png/",
        "/",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        ".",
        "~",
        "~/",
        "~root/x",
        "~\0/x",
        "sub",
        "x\0y",
        "a%00.png",
        "%2e%2e/a.png",
        "file:",
        "file://[/a.png",
        "file:////a.png",
        "C:\\a.png",
        "https://a.org/b.png",
        "data:,",
        "\u0344" * 3000,
        "/9j/" + 5000 * "A",
    ]
)
records = st.fixed_dictionaries(
    {}, optional={"image_path": paths | texts, "question": texts | values, "answer": texts | values}
)
lines = (
    records.map(lambda record: json.dumps(record).encode())
    | records.map(lambda record: json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=60)
    | st.sampled_from(
        [
            b"[" * 20_000,
            b'{"a":' * 5_000,
            b"1" * 6_000,
            b'{"image_path": "a.png", "image_path": "b.png", "question": "Q", "answer": "A"}',
            b'{"image_path": "a.png", "question": "Q", "answer": "A"}\r',
            b"\x00",
            b"\xef\xbb\xbf",
            b"NaN",
        ]
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    draw_picture(folder / "a.png", 1)
    return folder


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


@SETTINGS
@given(st.lists(lines, max_size=6).map(b"\n".join))
def test_any_bytes_are_examples_or_one_clear_error(folder, content):
    (folder / "lines.jsonl").write_bytes(content)
    before = contents(folder)
    try:
        data = dataset(folder / "lines.jsonl")
    except InputError as error:
        assert "lines.jsonl" in str(error) and "Traceback" not in str(error)
        assert all(line.isprintable() and len(line) < 1000 for line in str(error).split("\n"))
    else:
        for example in data.examples:
            assert example.question.strip() and example.answer.strip() and example.picture in data.pictures
        assert all(reason.isprintable() and len(reason) < 500 for _, reason in data.skipped)
    assert contents(folder) == before


@SETTINGS
@given(question=texts.filter(str.strip), answer=texts.filter(str.strip))
def test_any_text_is_trained_on_as_it_stands_or_refused(folder, tokenizer, question, answer):
    line = json.dumps({"image_path": "a.png", "question": question, "answer": answer})
    (folder / "lines.jsonl").write_text(line)
    try:
        data = dataset(folder / "lines.jsonl", tokenizer)
    except InputError as error:
        assert "surrogate" in str(error)
        return
    ids = data[0].answer_ids
    assert ids[-1] == tokenizer.eos_token_id
    if "<|endoftext|>" not in answer:
        assert tokenizer.decode(ids[:-1]) == f" {answer.strip()}"


def encoded(mode, size, form, draw):
    colours = {
        "I;16": [0, 15, 4095, 65535],
        "I": [-(2**31), -1, 0, 300, 2**31 - 1],
        "F": [float("nan"), float("inf"), float("-inf"), -3e38, 0.5, 300, 3e38],
    }
    image = Image.new(mode, size, draw.choice(colours.get(mode, [0])))
    if mode in colours and min(size) > 1:
        image.putpixel((1, 1), draw.choice(colours[mode]))
    if form == "GIF" or (form == "TIFF" and draw.random() < 0.3):
        frames = [Image.new(image.mode, size) for _ in range(2)]
        options = {"save_all": True, "append_images": frames}
    else:
        options = {}
    if form == "JPEG":
        exif = Image.Exif()
        exif[0x0112] = draw.randint(0, 9)
        options |= {"exif": exif, "progressive": draw.random() < 0.5}
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


FORMS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "TIFF": ["1", "L", "RGB", "RGBA", "CMYK", "I;16", "F", "I"],
    "GIF": ["1", "L", "P", "RGB"],
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["1", "L", "RGB"],
}
SIZES = [(1, 1), (20_000, 1), (1, 20_000), (3, 500), (640, 480), (511, 512), (14, 14)]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@SETTINGS
@given(st.integers(0, 2**32))
def test_any_picture_is_pixels_or_a_reason(folder, seed):
    """Pictures of every form, mode and odd size, whole, cut off, with bytes flipped, or plain noise."""
    draw = random.Random(seed)
    form = draw.choice(list(FORMS))
    sizes = [size for size in SIZES if form != "WEBP" or max(size) < 16_384]
    content = bytearray(encoded(draw.choice(FORMS[form]), draw.choice(sizes), form, draw))
    hurt = draw.choice(["whole", "cut", "flipped", "noise"])
    if hurt == "cut":
        del content[draw.randrange(len(content)) :]
    elif hurt == "flipped":
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif hurt == "noise":
        content = bytearray(draw.randbytes(draw.randint(0, 400)))
    path = folder / "hurt.img"
    path.write_bytes(content)

    try:
        pixels = pixels_of(look(path), preprocess)
    except PictureError as error:
        assert str(error).isprintable() and len(error.reason(path.name)) < 300
        assert hurt != "whole", f"{form}: {error}"
    else:
        assert pixels.shape[0] == 3 and set(pixels.shape[1:]) <= {378, 756}
        assert pixels.min() >= -1 and pixels.max() <= 1
    finally:
        path.unlink()


def test_a_long_thin_picture_costs_no_memory(folder):
    image = Image.new("RGB", (20_000, 1), "white")
    assert preprocess(image).shape == (3, 378, 756)
