"""Reading data: what is an example, what is left out and said, what ends the run."""

import hashlib
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoConfig

import finetune_moondream as script
from moondream2.cli import InputError
from moondream2.data import hold_out
from moondream2.pictures import KnownPictures, shown
from tests.shared import TINY, dataset, draw_picture, small_config, write_lines

LINE = {"image_path": "a.png", "question": "What?", "answer": "This."}


@pytest.fixture
def folder(tmp_path):
    draw_picture(tmp_path / "a.png", 1)
    draw_picture(tmp_path / "b.png", 2)
    return tmp_path


def read(folder, content, **options):
    path = folder / "lines.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return dataset(path, **options)


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
    lines = [LINE, *({**LINE, "image_path": name} for name in unusable), LINE, LINE]
    data = dataset(write_lines(folder / "lines.jsonl", lines))
    assert len(data) == 3
    assert len(data.skipped) == len(unusable)
    for number, ((place, reason), (name, why)) in enumerate(zip(data.skipped, unusable.items(), strict=True), start=2):
        assert place == f"{folder}/lines.jsonl:{number}"
        assert reason.startswith(f"picture {why}: {shown(name)}")


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        ("3", ("3",)),
        ("3.50", ("3.50",)),
        ("-1e3", ("-1e3",)),
        ("9" * 5000, ("9" * 5000,)),
        ("true", ("true",)),
        ("false", ("false",)),
        ('["no", "Yes", "yes.", 3, "Yes"]', ("Yes", "no", "yes.", "3")),
        ('["", " b ", null]', ("b",)),
        ('"Yes<|endoftext|>"', ("Yes",)),
        ('"Yes. <|endoftext|> <|endoftext|>\\n"', ("Yes.",)),
        ('["<|endoftext|>", "No<|endoftext|>"]', ("No",)),
        ('"a <|endoftext|> b"', ("a <|endoftext|> b",)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_an_answer_may_be(folder, written, answers):
    line = '{"image_path": "a.png", "question": "Q", "answer": ' + written + "}"
    config = AutoConfig.from_pretrained(TINY)
    config.text_config.max_position_embeddings = 9000
    data = read(folder, line, config=config)
    assert data[0].answers == answers and data[0].answer == answers[0]


@pytest.mark.parametrize("written", ['""', '" "', "null", "[]", '[""]', '"<|endoftext|>"'])
def test_a_line_without_an_answer_is_skipped_and_counted(folder, written):
    data = read(folder, json.dumps(LINE) + '\n{"image_path": "a.png", "question": "Q", "answer": ' + written + "}")
    assert len(data) == 1 and data.skipped == [(f"{folder}/lines.jsonl:2", "answer empty")]


@pytest.mark.parametrize("name", ["image_path", "question"])
@pytest.mark.parametrize("value", ["", "\t", None])
def test_a_line_without_picture_or_question_is_skipped_and_counted(folder, name, value):
    data = dataset(write_lines(folder / "lines.jsonl", [LINE, {**LINE, name: value}]))
    assert len(data) == 1 and data.skipped == [(f"{folder}/lines.jsonl:2", f"{name} empty")]


def test_no_special_token_comes_out_of_a_text(folder, tokenizer):
    words = "<|endoftext|> a <|endoftext|> b"
    data = dataset(write_lines(folder / "lines.jsonl", [{**LINE, "question": words, "answer": words}]))
    assert tokenizer.eos_token_id not in data[0].prompt_ids + data[0].answer_ids[:-1]
    assert tokenizer.decode(data[0].prompt_ids) == f"\n\nQuestion: {words}\n\nAnswer:"
    assert tokenizer.decode(data[0].answer_ids[:-1]) == f" {words}"


def test_what_an_example_is_does_not_hang_on_its_files_name(folder, monkeypatch):
    path = write_lines(folder / "lines.jsonl", [LINE, {**LINE, "answer": "That."}, {**LINE, "question": "Why?"}])
    keys = [example.key for example in dataset(path)]
    monkeypatch.chdir(folder)
    assert [example.key for example in dataset(Path("lines.jsonl"))] == keys and len(set(keys)) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            [{"image": "a.png", "conversations": []}],
            "is a JSON array with keys image, conversations: python",
        ),
        (
            "image,question,answer\na.png,Q,A\n",
            "is CSV with keys image, question, answer: python -m moon",
        ),
    ],
)
def test_a_file_in_another_form_is_told_by_its_keys(folder, content, said):
    with pytest.raises(InputError) as error:
        read(folder, content if isinstance(content, str) else json.dumps(content, indent=1))
    assert f"{folder}/lines.jsonl {said}" in str(error.value) and "malformed" not in str(error.value)


def test_where_most_pictures_are_missing_it_is_an_error(folder):
    """It says what was looked for, where, and what is there; up to a half they are skipped."""
    (folder / "photos").mkdir()
    draw_picture(folder / "photos" / "c.png", 3)
    missing = [{**LINE, "image_path": f"images/{name}.png"} for name in "cdef"]
    data = dataset(write_lines(folder / "lines.jsonl", [LINE] * 4 + missing))
    assert len(data) == 4 and data.skipped[0][1] == "picture not found: images/c.png"
    with pytest.raises(InputError) as error:
        dataset(write_lines(folder / "lines.jsonl", [LINE] * 3 + missing))
    assert str(error.value) == (
        f"4 of 7 lines in {folder}/lines.jsonl have no picture that is there, such as {folder}/lines.jsonl:4: "
        f"picture not found: images/c.png, looked for in {folder} and {Path.cwd()}; nearest is photos/c.png"
    )


def test_the_nearest_name_is_one_that_is_spelled_alike(folder):
    with pytest.raises(InputError, match=r"looked for in .*; nearest is a\.png$"):
        dataset(write_lines(folder / "lines.jsonl", [{**LINE, "image_path": "aa.png"}]))


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("{}", '"image_path" is missing'),
        ('{"image_path": "a.png", "question": "Q"}', '"answer" is missing'),
        ('{"image_path": "a.png", "question": "Q", "answer": {"text": "A"}}', '"answer" is not a text'),
        ('{"image_path": "a.png", "question": "Q", "answer": ["A", ["B"]]}', '"answer" is not a text'),
        ('{"image_path": "a.png", "question": 5, "answer": "A"}', '"question" is not a text'),
        ('{"image_path": ["a.png"], "question": "Q", "answer": "A"}', '"image_path" is not a text'),
        ('{"image_path": "a.png", "question": "Q", "answer": NaN}', "not JSON: NaN is no number"),
        ('{"image_path": "a.png", "question": "Q", "answer": "A", "question": "R"}', '"question" stands twice in it'),
        ('{"image_path": "a.png", "question": "Q", "answer": "A", "meta": {"a": 1, "a": 2}}', '"a" stands twice in it'),
        ('{"image_path": "a.png", "question": "Q", "answer": "\\ud83d"}', "lone surrogate"),
        ('{"image_path": "a.png", "question": "\\ud83d", "answer": "A"}', "lone surrogate"),
        ('{"image_path": "a.png", "question": "\\udc00", "answer": "A"}', "lone surrogate"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_malformed_line_is_named(folder, line, wrong):
    with pytest.raises(InputError, match="1 of 2 lines malformed") as error:
        read(folder, json.dumps(LINE) + "\n\n" + line)
    assert f"{folder}/lines.jsonl:3: {wrong}" in str(error.value) or wrong in str(error.value).splitlines()[1]
    assert "lines.jsonl:3" in str(error.value)


def test_bytes_that_are_not_utf8_are_named(folder):
    with pytest.raises(InputError, match=r"lines.jsonl:1: not UTF-8"):
        read(folder, b'{"image_path": "\xff\xfe"}')


def files(train, valid, test=None):
    """The constants that `read_data` takes."""
    return SimpleNamespace(train_file=train, valid_file=valid, test_file=test, features_dir=None)


def test_malformed_lines_are_named_before_any_picture_is_looked_at(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(KnownPictures, "look_at", lambda *args: pytest.fail("pictures are looked at"))
    train, valid = write_lines(folder / "train.jsonl", [LINE]), folder / "valid.jsonl"
    valid.write_text("{")
    with pytest.raises(InputError, match="valid.jsonl: 1 of 1 lines malformed"):
        script.read_data(files(train, valid), None, tokenizer, None)
    valid.write_text(train.read_text())
    (folder / "test.jsonl").write_text("{")
    with pytest.raises(InputError, match="test.jsonl: 1 of 1 lines malformed"):
        script.read_data(files(train, valid, folder / "test.jsonl"), None, tokenizer, None)


# ---------------------------------------------------------------------------------------------------------------------
# One file only
# ---------------------------------------------------------------------------------------------------------------------


def lines_on(folder, pictures, questions=3):
    """Lines on so many pictures, a few questions each."""
    for number in range(pictures):
        draw_picture(folder / f"{number}.png", number)
    names = [f"{number}.png" for number in range(pictures)]
    return [{"image_path": name, "question": f"Q{i}?", "answer": "A"} for name in names for i in range(questions)]


def names_in(*datasets):
    return [sorted({example.image_path for example in data.examples}) for data in datasets]


@pytest.mark.parametrize(("pictures", "expected"), [(2, 1), (14, 1), (16, 2), (40, 4)])
def test_a_tenth_of_the_pictures_is_held_out_with_all_their_questions(folder, pictures, expected):
    """Those whose file has the smallest digest, whatever the order of the lines."""
    lines = lines_on(folder, pictures)
    contents = {line["image_path"]: (folder / line["image_path"]).read_bytes() for line in lines}
    by_digest = sorted(contents, key=lambda name: hashlib.sha256(contents[name]).digest())
    for seed in (None, 1, 2):
        if seed:
            random.Random(seed).shuffle(lines)
        train = dataset(write_lines(folder / "train.jsonl", lines))
        held = hold_out(train)
        assert names_in(held, train) == [sorted(by_digest[:expected]), sorted(by_digest[expected:])]
        assert (len(held), len(train)) == (3 * expected, 3 * (pictures - expected))
        for each in (held, train):
            assert each.pictures.keys() == {example.picture for example in each.examples}
            order = [int(example.source.split(":")[-1]) for example in each.examples]
            assert order == sorted(order)


def test_files_of_one_content_are_on_one_side(folder):
    """Each picture lies there twice, under two names."""
    lines = lines_on(folder, 12)
    for line in list(lines):
        copied = f"copy_of_{line['image_path']}"
        (folder / copied).write_bytes((folder / line["image_path"]).read_bytes())
        lines.append({**line, "image_path": copied})
    train = dataset(write_lines(folder / "train.jsonl", lines))
    held = hold_out(train)
    (name, copied), others = names_in(held, train)
    assert copied == f"copy_of_{name}" and len(others) == 22


def test_pictures_that_no_line_can_use_are_not_held_out(folder):
    """They would leave nothing to judge by. What is skipped stays told of the file, once."""
    lines = lines_on(folder, 6)
    first = min(range(6), key=lambda number: hashlib.sha256((folder / f"{number}.png").read_bytes()).digest())
    lines = [{**line, "answer": ""} if line["image_path"] == f"{first}.png" else line for line in lines]
    train = dataset(write_lines(folder / "train.jsonl", lines))
    held = hold_out(train)
    assert len(held) == 3 and len(train) == 12 and f"{first}.png" not in sum(names_in(held, train), [])
    held.leave_out({"another": "reason"})
    assert (len(train.skipped), held.skipped) == (3, [])


def test_one_picture_can_not_be_divided(folder):
    train = dataset(write_lines(folder / "train.jsonl", [LINE, {**LINE, "question": "Why?"}]))
    said = "train.jsonl has one picture, and none to judge by: add others, or give a VALID_FILE"
    with pytest.raises(InputError, match=said):
        hold_out(train)


def test_without_a_valid_file_a_run_says_which_pictures_judge_it(folder, tokenizer, capsys):
    path = write_lines(folder / "train.jsonl", lines_on(folder, 40))
    stop = SimpleNamespace(check_alone=lambda: None)
    train, valid = script.read_data(files(path, None), small_config(), tokenizer, stop)
    out = capsys.readouterr().out
    first = list(dict.fromkeys(example.picture for example in valid))[:3]
    sources = [next(example.source for example in valid if example.picture == key) for key in first]
    told = f"No VALID_FILE: 4 of 40 pictures in {path} judge each epoch, with 12 questions ({', '.join(sources)}, …)"
    assert told in out.splitlines() and len(train.pictures) == 36
    assert [line.split() for line in out.splitlines() if line.startswith("pictures ")] == [["pictures", "36", "4"]]
    assert "train.jsonl" in out and "a tenth of train.jsonl" in out


def test_the_first_ten_malformed_lines_are_named(folder):
    with pytest.raises(InputError) as error:
        read(folder, "{\n" * 25)
    message = str(error.value)
    assert ": 25 of 25 lines malformed\n" in message and message.endswith("and 15 more")
    assert "lines.jsonl:10:" in message and "lines.jsonl:11:" not in message


def test_nothing_left_is_an_error(folder):
    with pytest.raises(InputError, match="no example that can be used"):
        read(folder, "\n\n")
    (folder / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"no example(.|\n)*picture broken: text.png"):
        dataset(write_lines(folder / "lines.jsonl", [{**LINE, "image_path": "text.png"}]))


def test_of_a_file_that_is_not_there_the_nearest_is_named(folder):
    write_lines(folder / "train.jsonl", [LINE])
    with pytest.raises(InputError, match=r"cannot read .*trian.jsonl: .*; nearest is train.jsonl$"):
        dataset(folder / "trian.jsonl")


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
    config = AutoConfig.from_pretrained(TINY)
    config.text_config.max_position_embeddings = 1 + 81 + len(data[0].prompt_ids) + len(data[0].answer_ids)
    assert len(dataset(path, tokenizer, config)) == 2
    config.text_config.max_position_embeddings -= 1
    with pytest.raises(InputError, match="no example"):
        dataset(path, tokenizer, config)


def test_the_sample_data_is_whole():
    root = Path(__file__).parent.parent
    train, valid, test = (dataset(root / name) for name in ("train.jsonl", "valid.jsonl", "tests/test.jsonl"))
    assert len(train) >= 240 and len(train.pictures) >= 60
    assert len(valid) >= 80 and len(valid.pictures) >= 20
    assert len(test) == 48 and len(test.pictures) == 12
    assert not train.skipped and not valid.skipped and not test.skipped
    pictures = [*train.pictures.values(), *valid.pictures.values(), *test.pictures.values()]
    assert len({p.key for p in pictures}) == len(pictures)
    sizes = [max(p.size) for p in pictures]
    assert min(sizes) < 512 <= max(sizes)
    assert sum(path.stat().st_size for path in {p.path for p in pictures}) < 4 * 2**20
