"""Reading data: what is an example, what is left out and said, what ends the run."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import finetune_moondream as script
from moondream2.cli import InputError
from moondream2.pictures import KnownPictures, shown
from tests.conftest import dataset, draw_picture, write_lines

LINE = {"image_path": "a.png", "question": "What?", "answer": "This."}


@pytest.fixture
def folder(tmp_path):
    draw_picture(tmp_path / "a.png", 1)
    draw_picture(tmp_path / "b.png", 2)
    return tmp_path


def read(folder, content):
    path = folder / "lines.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return dataset(path)


def test_examples_carry_their_place_and_picture(folder):
    lines = [LINE, {**LINE, "image_path": "b.png"}, {**LINE, "question": " Why? ", "answer": "\tSo. \n"}]
    data = dataset(write_lines(folder / "lines.jsonl", lines))
    assert [each.source for each in data.examples] == [f"{folder}/lines.jsonl:{n}" for n in (1, 2, 3)]
    assert (data[2].question, data[2].answer) == ("Why?", "So.")
    assert data[0].picture == data[2].picture != data[1].picture
    assert {p.path.name for p in data.pictures.values()} == {"a.png", "b.png"}
    assert data.pictures[data[0].picture].size == (140, 100)


def test_blank_lines_a_byte_order_mark_and_crlf_are_fine(folder):
    line = json.dumps(LINE)
    data = read(folder, f"\ufeff{line}\r\n\r\n   \n{line}\r\n")
    assert [each.source.rsplit(":")[-1] for each in data.examples] == ["1", "4"]


def test_pictures_are_found_beside_the_file_then_in_the_working_directory(folder, monkeypatch):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    draw_picture(elsewhere / "a.png", 5)
    draw_picture(elsewhere / "c.png", 6)
    monkeypatch.chdir(elsewhere)
    lines = [LINE, {**LINE, "image_path": "c.png"}, {**LINE, "image_path": str(folder / "b.png")}]
    data = dataset(write_lines(folder / "lines.jsonl", lines))
    paths = [data.pictures[each.picture].path.resolve() for each in data.examples]
    assert paths == [folder / "a.png", elsewhere / "c.png", folder / "b.png"]


def test_pictures_of_the_same_content_are_one(folder):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    data = dataset(write_lines(folder / "lines.jsonl", [LINE, {**LINE, "image_path": "copy.png"}]))
    assert len(data) == 2 and len(data.pictures) == 1


def make_unusable(folder):
    """Names of things that are no usable picture, and the word that says why."""
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:20])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return {
        "missing.png": "not found",
        "folder.png": "not found",
        "pipe.png": "not found",
        "nul\0.png": "not found",
        "long" * 100 + ".png": "not found",
        "cut.png": "broken",
        "text.png": "broken",
        "empty.png": "broken",
        "bomb.png": "too large",
    }


def test_unusable_pictures_are_skipped_and_counted(folder):
    unusable = make_unusable(folder)
    lines = [LINE, *({**LINE, "image_path": name} for name in unusable)]
    data = dataset(write_lines(folder / "lines.jsonl", lines))
    assert len(data) == 1
    assert len(data.skipped) == len(unusable)
    for number, ((place, reason), (name, why)) in enumerate(zip(data.skipped, unusable.items(), strict=True), start=2):
        assert place == f"{folder}/lines.jsonl:{number}"
        assert reason.startswith(f"picture {why}: {shown(name)}")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("{}", '"image_path" is missing'),
        ('{"image_path": "a.png", "question": "Q"}', '"answer" is missing'),
        ('{"image_path": "a.png", "question": "Q", "answer": 5}', '"answer" is not a text'),
        ('{"image_path": "a.png", "question": null, "answer": "A"}', '"question" is not a text'),
        ('{"image_path": "a.png", "question": "Q", "answer": "  "}', '"answer" is empty'),
        ('{"image_path": "", "question": "Q", "answer": "A"}', '"image_path" is empty'),
        ('{"image_path": "a.png", "question": "\\ud83d", "answer": "A"}', "lone surrogate"),
        ('{"image_path": "a.png", "question": "\\udc00", "answer": "A"}', "lone surrogate"),
        ("[" * 100_000, "nested too deep"),
        ('{"n": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_malformed_line_is_named(folder, line, wrong):
    with pytest.raises(InputError, match="1 malformed lines") as error:
        read(folder, json.dumps(LINE) + "\n\n" + line)
    assert f"{folder}/lines.jsonl:3: {wrong}" in str(error.value) or wrong in str(error.value).splitlines()[1]
    assert "lines.jsonl:3" in str(error.value)


def test_bytes_that_are_not_utf8_are_named(folder):
    with pytest.raises(InputError, match=r"lines.jsonl:1: not UTF-8"):
        read(folder, b'{"image_path": "\xff\xfe"}')


def test_malformed_lines_are_named_before_any_picture_is_looked_at(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(KnownPictures, "look_at", lambda *args: pytest.fail("pictures are looked at"))
    train, valid = write_lines(folder / "train.jsonl", [LINE]), folder / "valid.jsonl"
    valid.write_text("{")
    with pytest.raises(InputError, match="1 malformed lines in .*valid.jsonl"):
        script.read_data(SimpleNamespace(train_file=train, valid_file=valid, features_dir=None), tokenizer, 1000, None)


def test_the_first_ten_malformed_lines_are_named(folder):
    with pytest.raises(InputError) as error:
        read(folder, "{\n" * 25)
    message = str(error.value)
    assert message.startswith("25 malformed lines") and message.endswith("and 15 more")
    assert "lines.jsonl:10:" in message and "lines.jsonl:11:" not in message


def test_nothing_left_is_an_error(folder):
    with pytest.raises(InputError, match="no example that can be used"):
        read(folder, "\n\n")
    with pytest.raises(InputError, match=r"no example(.|\n)*picture not found: gone.png"):
        dataset(write_lines(folder / "lines.jsonl", [{**LINE, "image_path": "gone.png"}]))


@pytest.mark.parametrize("name", ["gone.jsonl", "."])
def test_a_file_that_cannot_be_read_is_an_error(folder, name):
    with pytest.raises(InputError, match="cannot read"):
        dataset(folder / name)


def test_an_example_too_long_is_skipped(folder, tokenizer):
    long = {**LINE, "answer": "word " * 3000}
    path = write_lines(folder / "lines.jsonl", [LINE, long, LINE])
    data = dataset(path, tokenizer)
    assert len(data) == 2
    ((place, reason),) = data.skipped
    assert place == f"{path}:2" and reason.startswith("too long")
    room = len(data[0].prompt_ids) + len(data[0].answer_ids)
    assert len(dataset(path, tokenizer, room)) == 2
    with pytest.raises(InputError, match="no example"):
        dataset(path, tokenizer, room - 1)


def test_the_sample_data_is_whole():
    root = Path(__file__).parent.parent
    train, valid = dataset(root / "train.jsonl"), dataset(root / "valid.jsonl")
    assert len(train) >= 240 and len(train.pictures) >= 60
    assert len(valid) >= 80 and len(valid.pictures) >= 20
    assert not train.skipped and not valid.skipped
    assert not train.pictures.keys() & valid.pictures.keys()
    sizes = [max(p.size) for p in (*train.pictures.values(), *valid.pictures.values())]
    assert min(sizes) < 512 <= max(sizes)
    files = {p.path for p in (*train.pictures.values(), *valid.pictures.values())}
    assert sum(file.stat().st_size for file in files) < 4 * 2**20
