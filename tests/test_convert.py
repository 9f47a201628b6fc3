"""Other forms than training lines: what is made of them, what is said of them. `datasets` itself reads, offline."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from moondream2 import convert, foreign
from moondream2.cli import InputError
from moondream2.convert import leans
from moondream2.data import parse_line, read_lines
from moondream2.foreign import DATASETS, described
from moondream2.pictures import KnownPictures, Picture, find_pictures
from tests.shared import ROOT, draw_picture, write_lines

LLAVA = [
    {
        "id": 1,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": " A box. "},
            {"from": "human", "value": "Which colour has the box?\n<image>"},
            {"from": "gpt", "value": "White, “really”."},
        ],
    },
    {
        "id": "two",
        "image": "b.png",
        "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
    },
]
LLAVA_LINES = [
    {"image_path": "a.png", "question": "What is it?", "answer": "A box."},
    {"image_path": "a.png", "question": "Which colour has the box?", "answer": "White, “really”."},
    {"image_path": "b.png", "question": "Why?", "answer": "So."},
]
FORMS = {
    "array": json.dumps,
    "pretty": lambda samples: "\n" + json.dumps(samples, indent=2, ensure_ascii=False) + "\n",
    "lines": lambda samples: "\r\n\r\n".join(map(json.dumps, samples)),
    "pretty, one below the other": lambda samples: "\ufeff" + "\n".join(json.dumps(each, indent=4) for each in samples),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    draw_picture(tmp_path / "a.png", 1)
    draw_picture(tmp_path / "b.png", 2)
    return tmp_path


def bytes_of(number, form="PNG"):
    """A file with a picture that no other number gives."""
    Image.linear_gradient("L").resize((30 + number, 20)).save(file := io.BytesIO(), form)
    return file.getvalue()


def lines_of(source, target=None, images=None, split="train", subset=None, **named):
    """What `convert` writes."""
    target = target or Path(source).parent / "made.jsonl"
    convert.convert(str(source), target, named, images, split, subset)
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def converted(folder, samples, **options):
    return lines_of(write_lines(folder / "source.jsonl", samples), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_llava_in_every_form_of_json(folder, form, capsys):
    source = folder / "llava.json"
    source.write_text(FORMS[form](LLAVA), encoding="utf-8")
    assert lines_of(source) == LLAVA_LINES
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/made.jsonl: 3 lines about 2 pictures, of 2 samples",
        "To train on it, a tenth of its pictures for validation: python finetune_moondream.py "
        f"--train_file {folder}/made.jsonl --valid_file none",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_json_is_the_same_wherever_a_read_ends(folder, form, monkeypatch):
    samples = [{"a": '[]{},\\" \n😀', "b": [1, 2.5, True, None], "c": {}}, {}, {"d": "]" * 50}] * 3
    (folder / "source.json").write_text(FORMS[form](samples), encoding="utf-8")
    for size in range(1, 60):
        monkeypatch.setattr(foreign, "CHUNK", size)
        assert list(foreign.read(str(folder / "source.json"))) == samples


def test_what_is_written_is_what_training_reads(folder):
    converted(folder, LLAVA)
    lines = read_lines(folder / "made.jsonl", "<|endoftext|>")
    read = [{"image_path": line.image_path, "question": line.question, "answer": line.answers[0]} for line in lines]
    assert read == LLAVA_LINES
    found = find_pictures(folder / "made.jsonl", lines, KnownPictures(None))
    assert all(isinstance(each, Picture) for each in found.values())


def test_chats_whose_pictures_lie_in_the_turns(folder, capsys):
    address = "data:image/png;base64," + base64.b64encode(bytes_of(3)).decode()
    texts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "here?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
    chats = [
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}, answer]}
        for parts in (
            [{"type": "image_url", "image_url": {"url": address}}, *texts],
            [{"type": "image", "image": "a.png"}, *texts],
            [{"type": "image"}, *texts],
        )
    ]
    chats[2]["images"] = ["b.png"]
    lines = converted(folder, chats)
    assert [(line["question"], line["answer"]) for line in lines] == [("What is\nhere?", "This.")] * 3
    assert [line["image_path"] for line in lines[1:]] == ["a.png", "b.png"]
    assert (folder / lines[0]["image_path"]).read_bytes() == bytes_of(3)
    assert "  3 x system message left out: sample 1, sample 2, sample 3\n" in capsys.readouterr().out


def test_moondreams_notebook_with_every_kind_of_answer(folder):
    answers = ["text", 3, 2.5, True, ["a", "b", 2], ["one", ""], [{"answer": "yes", "id": 1}, {"answer": "no"}]]
    qa = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]
    lines = converted(folder, [{"image": "a.png", "qa": qa}])
    assert [line["question"] for line in lines] == [f"{n}?" for n in range(7)]
    assert [line["answer"] for line in lines] == ["text", 3, 2.5, True, ["a", "b", "2"], "one", ["yes", "no"]]
    assert lines[3]["answer"] is True


@pytest.mark.parametrize("answers", [["yes", "no"], [{"answer": "yes"}, {"answer": "no"}], {"answer": ["yes", "no"]}])
def test_answers_of_several_people(folder, answers):
    (line,) = converted(folder, [{"image": "a.png", "question": "Q?", "answers": answers}])
    assert line == {"image_path": "a.png", "question": "Q?", "answer": ["yes", "no"]}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_texts_stay_as_they_are(folder, separator):
    rows = [["img", "question", "answer"], ["a.png", '"One, two;\tor\n""three""?"', "007"]]
    rows += [["b.png", "Q?", answer] for answer in ("1.50", "NA", "2024-05-01", "true")]
    (folder / "source.csv").write_text("\ufeff" + "\r\n".join(separator.join(row) for row in rows), encoding="utf-8")
    lines = lines_of(folder / "source.csv")
    assert [line["answer"] for line in lines] == ["007", "1.50", "NA", "2024-05-01", "true"]
    assert lines[0] == {"image_path": "a.png", "question": 'One, two;\tor\n"three"?', "answer": "007"}


def test_keys_are_named_or_asked_for(folder):
    samples = [{"photo": "a.png", "prompt": "Q?", "response": "A", "question": "wrong"}]
    with pytest.raises(InputError) as error:
        converted(folder, samples)
    assert str(error.value) == (
        f"{folder}/source.jsonl has the keys photo, prompt, response, question: which is the image, which the answer? "
        "Say it by --image_key KEY --answer_key KEY"
    )
    (line,) = converted(folder, samples, image="photo", question="prompt", answer="response")
    assert line == {"image_path": "a.png", "question": "Q?", "answer": "A"}


@pytest.mark.parametrize(
    "content", ['[{"image": "a.png"', '[{"image": "a"}', '[{"a": 1}] x', "{", "[" * 10**5, "a,b\n1,2"]
)
def test_a_file_that_says_nothing_is_one_line(folder, content):
    (folder / "source").write_text(content)
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match="source"):
        lines_of(folder / "source", image="image", question="image", answer="image")
    assert sorted(folder.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# By `datasets`
# ---------------------------------------------------------------------------------------------------------------------


def save_parquet(path, columns, **features):
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(path)
    return path


def save_pictures(path):
    """Parquet with four pictures inside, two of them the same, and their bytes."""
    contents = [bytes_of(1), bytes_of(2, "JPEG"), bytes_of(1), bytes_of(3, "WEBP")]
    pictures = [{"bytes": content, "path": "misnamed.gif"} for content in contents]
    columns = {"image": pictures, "question": ["Q?"] * 4, "answer": [0, 1, 0, 1]}
    classes = datasets.ClassLabel(names=["cat", "dog"])
    save_parquet(path, columns, image=datasets.Image(), question=datasets.Value("string"), answer=classes)
    return contents


def test_pictures_inside_parquet_become_files(folder, capsys):
    contents = save_pictures(folder / "a[1]*.parquet")
    lines = lines_of(folder / "a[1]*.parquet", folder / "train.jsonl")
    assert [(folder / line["image_path"]).read_bytes() for line in lines] == contents
    assert [Path(line["image_path"]).suffix for line in lines] == [".png", ".jpg", ".png", ".webp"]
    assert len(list((folder / "train_images").iterdir())) == 3
    assert [line["answer"] for line in lines] == ["cat", "dog", "cat", "dog"]
    assert f"The pictures that lay inside are files in {folder}/train_images\n" in capsys.readouterr().out


def test_lists_of_pictures_and_of_texts(folder):
    pictures = [[{"bytes": bytes_of(n), "path": None} for n in numbers] for numbers in ([1], [2, 3])]
    texts = [[{"user": "Q?", "assistant": "A"}, {"user": "R?", "assistant": "B"}]] * 2
    text = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    features = {"images": datasets.List(datasets.Image()), "texts": datasets.List(text)}
    lines = lines_of(save_parquet(folder / "a.parquet", {"images": pictures, "texts": texts}, **features))
    assert [(line["question"], line["answer"]) for line in lines] == [("Q?", "A"), ("R?", "B")]
    assert (folder / lines[0]["image_path"]).read_bytes() == bytes_of(1)


def test_a_folder_of_pictures_with_metadata(folder, tmp_path_factory):
    write_lines(
        folder / "metadata.jsonl", [{"file_name": name, "question": "Q?", "answer": "A"} for name in ("a.png",)]
    )
    target = tmp_path_factory.mktemp("elsewhere") / "train.jsonl"
    (line,) = lines_of(folder, target)
    assert (target.parent / line["image_path"]).read_bytes() == (folder / "a.png").read_bytes()
    assert not Path(line["image_path"]).is_absolute()


@pytest.mark.slow
def test_a_dataset_of_the_hub_by_the_shell_without_a_network(folder, cache):
    """In the cache, which is laid here as a download leaves it."""
    home, source = folder / "home" / "datasets", folder / "pictures"
    source.mkdir()
    contents = save_pictures(source / "validation.parquet")
    datasets.load_dataset(str(source), split="validation", cache_dir=str(home))
    (home / "pictures").rename(home / "owner___pictures")
    words = ["owner/pictures", str(folder / "valid.jsonl"), "--split", "validation", "--answer_key", "question"]
    done = subprocess.run(
        [sys.executable, "-m", "moondream2.convert", *words],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    assert [(folder / line["image_path"]).read_bytes() for line in lines] == contents
    assert [line["answer"] for line in lines] == ["Q?"] * 4


def test_what_datasets_cannot_read_is_one_line(folder):
    save_pictures(folder / "train.parquet")
    for source, options, error in (
        ("owner/name", {}, "cannot read owner/name: Couldn't reach 'owner/name' on the Hub"),
        (str(folder), {"split": "test"}, "Unknown split \"test\". Should be one of ['train']"),
        ("data/gone.parquet", {}, "there is no file or folder data/gone.parquet"),
    ):
        with pytest.raises(InputError) as raised:
            lines_of(source, folder / "made.jsonl", **options)
        assert error in str(raised.value) and "\n" not in str(raised.value)
    for name in "ab":
        (folder / "sets" / name).mkdir(parents=True)
        save_pictures(folder / "sets" / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in "ab")
    (folder / "sets" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(InputError, match=r"\['a', 'b'\].*--subset NAME picks it"):
        lines_of(folder / "sets")
    assert len(lines_of(folder / "sets", subset="b")) == 4


def test_without_datasets_it_is_named_and_json_needs_none(folder, monkeypatch):
    (folder / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert converted(folder, LLAVA) == LLAVA_LINES
    with pytest.raises(InputError, match=f"pip install {DATASETS}$"):
        lines_of(folder / "a.parquet", folder / "other.jsonl")
    assert DATASETS in (ROOT / "tests" / "requirements.txt").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# What makes no line, and what is doubtful
# ---------------------------------------------------------------------------------------------------------------------


def test_what_makes_no_line_is_counted_and_named(folder, capsys):
    good = {"image": "a.png", "question": "Q?", "answer": "A"}
    bad = {
        "no picture": [{"image": None}, {"image": ""}, {"image": []}],
        "several pictures": [{"image": ["a.png", "b.png"]}],
        "picture broken": [{"image": "data:image/png;base64,AAAA"}],
        "picture that is a int": [{"image": 5}],
        "question without a text": [{"question": " <image>\n"}, {"question": None}],
        "question without an answer": [{"answer": a} for a in ("", "  ", None, [], ["", None], float("nan"), [{}])],
        "answer that is no text but a dict": [{"answer": {"text": "A"}}],
        "half a character (a lone surrogate)": [{"answer": "\ud83d"}, {"question": "\udc00"}, {"image": "\ud800"}],
    }
    samples = [good, *(good | change for changes in bad.values() for change in changes), {"image": "a.png"}, [1]]
    (folder / "source.json").write_text(json.dumps(samples))
    assert len(lines_of(folder / "source.json")) == 1
    expected, number = [], 2
    for reason, changes in bad.items():
        places = [f"sample {each}" for each in range(number, number + len(changes))]
        expected.append(f"  {len(changes)} x {reason}: {', '.join(places[:5])}{', …' if len(places) > 5 else ''}")
        number += len(changes)
    expected += [f"  1 x no question and no answer: sample {number}", f"  1 x no object with keys: sample {number + 1}"]
    _, title, *lines, _ = capsys.readouterr().out.splitlines()
    assert (title, lines) == ("Skipped:", expected)


def test_a_conversation_lacks_a_picture_or_a_turn(folder, capsys):
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Q?"}, {"from": "human", "value": "R?"}]
    turns += [{"from": "gpt", "value": "B"}, {"from": "human", "value": "S?"}]
    (line,) = converted(folder, [{"conversations": turns}, {"image": "a.png", "conversations": turns}])
    assert line == {"image_path": "a.png", "question": "R?", "answer": "B"}
    said = capsys.readouterr().out
    assert "  1 x no picture: sample 1\n" in said
    assert "  2 x question without a text: sample 1, sample 2\n" in said
    assert "  4 x question without an answer: sample 1, sample 1, sample 2, sample 2\n" in said


def test_a_comma_without_quotation_marks_is_told(folder, capsys):
    (folder / "source.csv").write_text("image,question,answer\na.png,Q?,A\na.png,Well, what?,A\na.png,Q?\n")
    assert len(lines_of(folder / "source.csv")) == 1
    said = capsys.readouterr().out
    assert "1 x more cells than columns: sample 2\n" in said and "1 x question without an answer: sample 3\n" in said


def test_where_nothing_is_left_the_keys_are_named(folder):
    talk = {"photo": "a.png", "conversations": LLAVA[0]["conversations"]}
    with pytest.raises(InputError, match="its keys are photo, conversations\n  1 x no picture: sample 1$"):
        converted(folder, [talk])
    assert len(converted(folder, [talk], image="photo")) == 2


@pytest.mark.parametrize(
    "question",
    [
        "And its colour?",
        "What about the other one?",
        "Is it red?",
        "What colour is it?",
        "What are they doing?",
        "Is he wearing a hat?",
        "Who is beside her?",
        "Why?",
        "Why not?",
    ],
)
def test_a_question_that_leans(question):
    assert leans(question)


@pytest.mark.parametrize(
    "question",
    [
        "What is the man doing with his hands?",
        "Is it safe to cross?",
        "Is it possible to see the sky?",
        "Was it raining?",
        "What is this?",
        "Why is the road wet?",
        "Are people holding their bags?",
        "Does anyone carry his coat?",
        "Which items lie on the table?",
        "Andrew is where?",
    ],
)
def test_a_question_that_stands_alone(question):
    assert not leans(question)


def test_later_questions_that_lean_are_counted_and_written(folder, capsys):
    qa = [
        {"question": question, "answer": "A"} for question in ("Is it red?", "What is it?", "Is the car red?", "Why?")
    ]
    lines = converted(folder, [{"image": "a.png", "qa": qa[2:3]}, {"image": "a.png", "qa": qa}])
    assert [line["question"] for line in lines[1:]] == [each["question"] for each in qa]
    what = '  2 x question that leans on an earlier one, but is asked alone: sample 2 "What is it?", sample 2 "Why?"\n'
    assert what in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_paths_are_found_from_the_lines(folder, tmp_path_factory, monkeypatch, capsys):
    elsewhere, home = tmp_path_factory.mktemp("elsewhere"), folder / "deep" / "er"
    home.mkdir(parents=True)
    (folder / "sub").mkdir()
    for file in (folder / "sub" / "c.png", elsewhere / "d.png", elsewhere / "e.png"):
        draw_picture(file, 3)
    monkeypatch.chdir(elsewhere)
    names = ["a.png", "./sub/../b.png", r"sub\c.png", "file:///" + str(folder / "a.png")[1:], str(elsewhere / "d.png")]
    names += ["e.png", "gone/f.png", "https://host/g.png"]
    samples = [{"image": name, "question": "Q?", "answer": "A"} for name in names]
    made = [line["image_path"] for line in converted(folder, samples, target=home / "train.jsonl")]
    assert made[:5] == ["../../a.png", "../../b.png", "../../sub/c.png", "../../a.png", str(elsewhere / "d.png")]
    assert (home / made[5]).samefile(elsewhere / "e.png")
    assert made[6:] == ["gone/f.png", "https://host/g.png"]
    said = capsys.readouterr().out
    assert f"  1 x picture not found in {folder}: --images FOLDER says where the paths begin: sample 7\n" in said
    assert "  1 x address, which training does not fetch: download the picture and put its path there: sample 8" in said


def test_paths_begin_in_the_images_folder(folder):
    (folder / "coco").mkdir()
    draw_picture(folder / "coco" / "a.png", 7)
    (line,) = converted(folder, [{"image": "a.png", "question": "Q?", "answer": "A"}], images=folder / "coco")
    assert line["image_path"] == "coco/a.png"


def test_base64_is_a_picture_and_a_long_name_a_path(folder, capsys):
    text = base64.encodebytes(bytes_of(5)).decode()
    names = [text, {"bytes": text, "path": "x.png"}, "a" * 64, "folder/" * 40]
    lines = converted(folder, [{"image": name, "question": "Q?", "answer": "A"} for name in names])
    assert [(folder / line["image_path"]).read_bytes() for line in lines[:2]] == [bytes_of(5)] * 2
    assert [line["image_path"] for line in lines[2:]] == names[2:]
    assert "2 x picture not found" in capsys.readouterr().out


def test_a_file_in_the_cache_is_copied(folder, tmp_path_factory):
    draw_picture(cached := tmp_path_factory.mktemp("cache") / "0123.png", 9)
    sample = {"image": {"bytes": None, "path": str(cached)}, "question": "Q?", "answer": "A"}
    (line,) = converted(folder, [sample])
    assert line["image_path"].startswith("made_images/")
    assert (folder / line["image_path"]).read_bytes() == cached.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What exists
# ---------------------------------------------------------------------------------------------------------------------


def inside(count):
    texts = [base64.b64encode(bytes_of(number)).decode() for number in range(count)]
    return [{"image": f"data:image/png;base64,{text}", "question": "Q?", "answer": "A"} for text in texts]


@pytest.mark.parametrize("name", ["made.jsonl", "made_images"])
def test_nothing_that_exists_is_overwritten(folder, name):
    (folder / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=f"{name} exists, and nothing is overwritten"):
        converted(folder, inside(2))
    assert {path.name for path in folder.iterdir()} == {"a.png", "b.png", "source.jsonl", name}


def test_a_target_that_exists_is_told_before_anything_is_read(folder):
    with pytest.raises(InputError, match="a.png exists"):
        lines_of(folder / "gone.json", folder / "a.png")


@pytest.mark.parametrize("ended_by", [InputError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing_and_can_be_typed_again(folder, ended_by, monkeypatch):
    source = write_lines(folder / "source.jsonl", inside(3))
    before = sorted(folder.iterdir())

    def interrupted(*args):
        yield from inside(2)
        raise ended_by

    with monkeypatch.context() as patch, pytest.raises(ended_by):
        patch.setattr(convert, "read", interrupted)
        lines_of(source)
    assert sorted(folder.iterdir()) == before
    assert len(lines_of(source)) == 3


@pytest.mark.parametrize("name", ["made.jsonl", "made_images"])
def test_what_comes_into_being_meanwhile_is_not_overwritten(folder, name, monkeypatch):
    before = {path.name for path in folder.iterdir()}

    def read(*args):
        yield from inside(1)
        (folder / name).mkdir()
        (folder / name / "mine").touch()

    monkeypatch.setattr(convert, "read", read)
    with pytest.raises(InputError, match=f"{name} exists"):
        converted(folder, [])
    assert (folder / name / "mine").exists()
    assert {path.name for path in folder.iterdir()} == before | {"source.jsonl", name}


# ---------------------------------------------------------------------------------------------------------------------
# What training says of such a file
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_of_another_form_is_described(folder):
    line = {"image_path": "a.png", "question": "Q?", "answer": "A"}
    command = f"python -m moondream2.convert {folder}"
    flags = "--image_key KEY --question_key KEY"
    for name, content, said in (
        (
            "a.json",
            json.dumps(LLAVA),
            f"a JSON array with keys id, image, conversations: {command}/a.json {folder}/a.jsonl",
        ),
        (
            "b.json",
            json.dumps([line], indent=1),
            f"a JSON array with keys image_path, question, answer: {command}/b.json",
        ),
        ("c.jsonl", '{"image": "", "qa": [{}]}', f"JSON with keys image, qa: {command}/c.jsonl {folder}/c_lines.jsonl"),
        (
            "d.json",
            '{"img\\n": "", "answer": ""}',
            f"JSON with keys 'img\\n', answer: {command}/d.json {folder}/d.jsonl {flags}",
        ),
        ("e.csv", "photo,answer\n1,2", f"CSV with keys photo, answer: {command}/e.csv {folder}/e.jsonl {flags}"),
        ("f.jsonl", "image;question;answer\n1;2;3", "CSV with keys image, question, answer: "),
        ("g.parquet", "PAR1", f"parquet: {command}/g.parquet {folder}/g.jsonl"),
    ):
        (folder / name).write_text(content)
        told = described(folder / name)
        assert told.startswith(f"{folder}/{name} is {said}") and told.endswith(" makes lines of it"), told
        assert "\n" not in told


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[1, 2]", "[" * 10**5, "What is it?\nWell, this.", "1, 2\n3, 4", "\xff"]
)
def test_lines_and_what_nobody_can_read_are_not_described(folder, content):
    (folder / "train.jsonl").write_text(content, encoding="latin-1")
    assert described(folder / "train.jsonl") is None


def test_training_lines_are_not_described(folder):
    write_lines(folder / "train.jsonl", [{"image_path": "a.png", "question": "Q?"}])
    assert described(folder / "train.jsonl") is None
    assert described(folder / "gone.jsonl") is None and described(folder) is None


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=9),
    lambda x: (
        st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["answer", "from", "value", "role", "text"]), x)
    ),
)
keys = st.sampled_from(["image", "question", "answer", "qa", "conversations", "messages", "x"])
turns = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | values, "value": values}), max_size=3
)
samples = st.dictionaries(keys, values | turns, max_size=5) | values


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(st.lists(samples, max_size=4).map(lambda each: json.dumps(each).encode()) | st.binary(max_size=60))
def test_any_file_is_lines_or_one_clear_error(tmp_path_factory, content):
    source = tmp_path_factory.mktemp("any") / "source"
    source.write_bytes(content)
    told = described(source)
    assert told is None or "\n" not in told
    try:
        for line in lines_of(source):
            assert list(line) == ["image_path", "question", "answer"]
            assert isinstance(line["answer"], str | int | float | bool | list) and line["answer"] not in ("", [])
            parse_line(json.dumps({**line, "answer": "A"}))
    except InputError as error:
        assert "source" in str(error)
        assert [path.name for path in source.parent.iterdir()] == ["source"]
