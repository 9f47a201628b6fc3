"""Makes training lines of questions in another form: JSON, CSV, parquet, a folder of such, a dataset on the hub.

python -m moondream2.convert llava.json mine.jsonl --images coco
python -m moondream2.convert photos.csv mine.jsonl --image_key photo --question_key prompt --answer_key response
python -m moondream2.convert owner/name mine_valid.jsonl --split validation

Forms are told by their keys; docs/data.md shows them. Nothing that exists is overwritten.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from moondream2 import cli
from moondream2.cli import InputError
from moondream2.files import write_whole
from moondream2.foreign import KNOWN, PAIRS, TURNS, key_of, keys_in, list_in, read, untold
from moondream2.pictures import find_picture

ROLES = {"human": "user", "gpt": "assistant"}
MOST = 5  # places that are named of whatever is counted

# Whether a question can't be understood without an earlier one: it goes on from that, or a pronoun comes before any
# noun that it could stand for, which an article or the like announces. "This" and "that" may point at the picture, and
# the "it" of "is it safe" or "is it raining" stands for nothing. A guess, in English: it is counted, not acted on.
GOES_ON = re.compile(r"(and|but|or|also|then|(what|how) about|what else)\b|why( not)?\W*$", re.I)
PRONOUN = re.compile(r"\b(it|its|they|them|theirs?|he|him|his|she|hers?)\b", re.I)
NOUN = re.compile(r"\b(an?|the|this|that|these|those|some|any|every|each|no|my|your|there|people|\w+one)\b", re.I)
EMPTY_IT = re.compile(r"\b(is|was) it (\w+ to\b|safe|likely|rain|snow|sunny|cloud|wind|fog|day|night|dark)", re.I)


class Unusable(Exception):
    """A sample, or a question of it, that makes no line; the message says why."""


class Notes:
    """What is said at the end: what was skipped and what is doubtful, how often, and in which samples first."""

    def __init__(self):
        self.sample, self.skipped, self.doubtful = 0, {}, {}

    def skip(self, what):
        self.add(self.skipped, what)

    def doubt(self, what, example=""):
        self.add(self.doubtful, what, example)

    def add(self, counted, what, example=""):
        count, places = counted.get(what, (0, []))
        counted[what] = count + 1, [*places, f"sample {self.sample}{example}"][:MOST]


def lines_of(counted):
    return [f"  {n:,} x {what}: {', '.join(at)}{', …' if n > MOST else ''}" for what, (n, at) in counted.items()]


# ---------------------------------------------------------------------------------------------------------------------
# What a sample says
# ---------------------------------------------------------------------------------------------------------------------


def read_sample(sample, named, notes):
    """A sample's pictures, and (question, answer) of each of its questions; None for what is missing."""
    if not isinstance(sample, dict):
        raise Unusable("no object with keys")
    if None in sample:  # csv's key of what a comma without quotation marks has pushed out
        raise Unusable("more cells than columns")
    if parts := untold(sample, named):
        raise Unusable(f"no {' and no '.join(parts)}".replace("image", "picture"))
    image, *texts = (key_of(part, sample, named) for part in KNOWN)
    pictures = sample.get(image)
    if None not in texts:
        return pictures, [tuple(map(sample.get, texts))]
    if turns := list_in(sample, TURNS):
        inside, pairs = read_turns(turns, notes)
        return inside or pictures, pairs
    pairs = list_in(sample, PAIRS)
    return pictures, [tuple(each.get(key_of(part, each, named)) for part in ("question", "answer")) for each in pairs]


def read_turns(turns, notes):
    """The pictures that lie in the turns of a conversation, and its (question, answer)s."""
    pictures, pairs, asked = [], [], None
    for turn in turns:
        role, content = str(turn.get("from") or turn.get("role")), turn.get("value") or turn.get("content")
        if isinstance(content, list):  # of texts and pictures
            parts = [part if isinstance(part, dict) else {"text": part} for part in content]
            pictures += [value for part in parts if (value := part.get("image") or part.get("image_url"))]
            content = "\n".join(str(part["text"]) for part in parts if part.get("text"))
        if ROLES.get(role, role) == "assistant":
            pairs.append((asked, content))
            asked = None
        elif ROLES.get(role, role) == "user":
            if asked is not None:
                pairs.append((asked, None))
            asked = content or ""
        else:
            notes.doubt(f"{role} message left out")
    return pictures, [*pairs, (asked, None)] if asked is not None else pairs


def question_of(value):
    question = re.sub(" ?<image>", "", value).strip() if isinstance(value, str) else ""
    if not question:
        raise Unusable("question without a text")
    return whole(question)


def answer_of(value):
    """An answer as lines hold it: a text, a number, true or false, or a list of texts, as several people gave them."""
    if several := list_in({"answers": value}, ["answers"]):
        value = [each.get("answer") for each in several]
    if isinstance(value, list):
        numbers = [json.dumps(each) if isinstance(each, bool | int | float) else each for each in value]
        texts = [whole(each.strip()) for each in numbers if isinstance(each, str) and each.strip()]
        value = texts if len(texts) > 1 else "".join(texts)
    if isinstance(value, str):
        value = whole(value.strip())
    if value in ("", None) or isinstance(value, float) and not math.isfinite(value):
        raise Unusable("question without an answer")
    if not isinstance(value, str | bool | int | float | list):
        raise Unusable(f"answer that is no text but a {type(value).__name__}")
    return value


def whole(text):
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Unusable("half a character (a lone surrogate)")
    return text


def leans(question):
    """Whether a later question seems to lean on an earlier one: "And its colour?"."""
    question = EMPTY_IT.sub("", question)
    pronoun = PRONOUN.search(question)
    return bool(GOES_ON.match(question) or pronoun and not NOUN.search(question[: pronoun.start()]))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


class Pictures:
    """Where the pictures of lines lie.

    Those that lie inside the source become files in a folder beside `target`, with the bytes that they were. `stack`
    completes that folder before it completes the lines.
    """

    def __init__(self, base, target, stack, notes):
        self.base, self.home, self.stack, self.notes = Path(base).resolve(), target.parent.resolve(), stack, notes
        self.folder, self.filled = target.with_name(f"{target.stem}_images"), None

    def path_of(self, value):
        """The image_path of a picture as a sample holds it; raises Unusable where there is none, or several."""
        if isinstance(value, list):
            if len(value) > 1:
                raise Unusable("several pictures")
            value = value[0] if value else None
        if isinstance(value, dict):
            value = value.get("bytes") or self.cached(value) or value.get("path") or value.get("url")
        if not value:
            raise Unusable("no picture")
        if not isinstance(value, str | bytes):
            raise Unusable(f"picture that is a {type(value).__name__}")
        content = content_of(value)
        return self.found(whole(value.strip().removeprefix("file://"))) if content is None else self.keep(content)

    def keep(self, content):
        """Makes a file of a picture, once for each content."""
        if (kind := format_of(content)) is None:
            raise Unusable("picture broken")
        if self.filled is None:
            refuse(self.folder)
            self.filled = self.stack.enter_context(write_whole(self.folder))
            self.filled.mkdir()
        suffix = {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)
        file = self.filled / f"{hashlib.sha256(content).hexdigest()[:20]}.{suffix}"
        if not file.exists():
            file.write_bytes(content)
        return f"{self.folder.name}/{file.name}"

    def found(self, name):
        """A path as it is found from the lines' folder; as it stands where it leads to no file."""
        if re.match("https?://", name):
            self.notes.doubt("address, which training does not fetch: download the picture and put its path there")
            return name
        if file := find_picture(self.base / "lines", name):
            return name if self.is_elsewhere(name) else Path(os.path.relpath(file, self.home)).as_posix()
        self.notes.doubt(f"picture not found in {self.base}: --images FOLDER says where the paths begin")
        return name

    def is_elsewhere(self, name):
        return Path(name).is_absolute() and not Path(name).is_relative_to(self.base)

    def cached(self, value):
        """The bytes of a file in the cache of `datasets`, which is no place for it to stay; None where it is none."""
        path = value.get("path")
        is_cached = isinstance(path, str) and self.is_elsewhere(path) and find_picture(self.base / "lines", path)
        return Path(path).read_bytes() if is_cached else None


def content_of(value):
    """The bytes of a picture that lies in a sample as bytes, base64 or a data: address; None where it is a path."""
    if isinstance(value, bytes):
        return value
    is_address = value.startswith("data:")
    if not is_address and "." in value:  # which base64 has not
        return None
    try:
        text = value.partition(",")[2] if is_address else value
        content = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        content = b""
    return content if is_address or format_of(content) else None


def format_of(content):
    """Pillow's name for the format of a picture, in lower case; None where it knows none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format.lower()
    except Exception:  # it raises many kinds
        return None


def refuse(path):
    if os.path.lexists(path):
        raise InputError(f"{path} exists, and nothing is overwritten: move it away, or give another TARGET")


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


def make_lines(sample, named, pictures, notes):
    """The lines of a sample, as dictionaries; what makes none is noted."""
    made = []
    try:
        picture, pairs = read_sample(sample, named, notes)
        for question, answer in pairs:
            try:
                line = {"question": question_of(question), "answer": answer_of(answer)}
                if made and leans(line["question"]):
                    example = json.dumps(line["question"][:60], ensure_ascii=False)
                    notes.doubt("question that leans on an earlier one, but is asked alone", f" {example}")
                made.append(line)
            except Unusable as error:
                notes.skip(str(error))
        path = pictures.path_of(picture) if made else None
        return [{"image_path": path, **line} for line in made]
    except Unusable as error:
        notes.skip(str(error))
        return []


def convert(source, target, named, images=None, split="train", subset=None):
    """Writes the lines of a source, and the pictures that lie inside it; prints what was written and what was not.

    Args:
        named: {"image", "question", "answer": its key in a sample; None: it is told by a key that is known}.
        images: the folder in which paths begin; None: the source's.
    Raises:
        InputError: the source can't be read, is in no known form or has nothing to use, or the target exists.
    """
    refuse(target)
    path, notes, names, written = Path(source), Notes(), set(), 0
    base = images or (path if path.is_dir() else path.parent if path.is_file() else Path())
    with ExitStack() as stack:
        beside = stack.enter_context(write_whole(target))
        file = stack.enter_context(beside.open("w", encoding="utf-8", newline="\n"))
        pictures = Pictures(base, target, stack, notes)
        samples = stack.enter_context(closing(read(source, split, subset)))
        for sample in tqdm(samples, "Converting", unit="", leave=False, delay=1):
            if not notes.sample and isinstance(sample, dict) and (parts := untold(sample, named)):
                flags = " ".join(f"--{part}_key KEY" for part in parts)
                which = ", which the ".join(parts)
                raise InputError(f"{source} has the keys {keys_in(sample)}: which is the {which}? Say it by {flags}")
            notes.sample += 1
            for line in make_lines(sample, named, pictures, notes):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                names.add(line["image_path"])
                written += 1
        if not written:
            keys = f"; its keys are {keys_in(sample)}" if notes.sample and isinstance(sample, dict) else ""
            raise InputError("\n".join([f"nothing in {source} can be used{keys}", *lines_of(notes.skipped)]))
        refuse(target)  # which may have come meanwhile
        if pictures.filled:
            refuse(pictures.folder)
    print(f"{target}: {written:,} lines about {len(names):,} pictures, of {notes.sample:,} samples")
    if pictures.filled:
        print(f"The pictures that lay inside are files in {pictures.folder}")
    for title, counted in (("Skipped:", notes.skipped), ("Look at these:", notes.doubtful)):
        if counted:
            print("\n".join([title, *lines_of(counted)]))
    flags = f"--train_file {shlex.quote(str(target))} --valid_file none"
    print(f"To train on it, a tenth of its pictures for validation: python finetune_moondream.py {flags}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", help="a JSON, CSV or parquet file, a folder of such, or owner/name on the hub")
    parser.add_argument("target", help="the JSONL file to write")
    for part, known in KNOWN.items():
        parser.add_argument(f"--{part}_key", metavar="KEY", help=f"what the {part} is called; default: {known}")
    parser.add_argument("--images", metavar="FOLDER", help="where paths of pictures begin; default: SOURCE's folder")
    parser.add_argument("--split", default="train", help="of a folder or the hub's")
    parser.add_argument("--subset", help="of the hub's, where there are several")
    words = parser.parse_args()
    named = {part: getattr(words, f"{part}_key") for part in KNOWN}
    try:
        convert(words.source, Path(words.target), named, words.images, words.split, words.subset)
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was written, and the same command begins again")


if __name__ == "__main__":
    cli.run(main)
