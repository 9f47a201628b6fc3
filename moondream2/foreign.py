"""Files of other forms than training lines: told by how they begin and by their keys, read sample by sample."""

import csv
import glob
import json
import re
import shlex
from contextlib import closing
from pathlib import Path

from moondream2.cli import InputError

DATASETS = "datasets==5.2.0"  # reads parquet, folders and the hub; training does without
KNOWN = {  # keys that tell what lies under them, in the order in which they are looked for
    "image": ["image", "images", "image_path", "img", "file_name"],
    "question": ["question", "user"],
    "answer": ["answer", "answers", "assistant"],
}
TURNS = ["conversations", "messages"]  # keys of the turns of a conversation
PAIRS = ["qa", "texts"]  # keys of questions with their answers
CHUNK = 1 << 20  # characters that are read at once


def described(path):
    """What a file of another form is, in a line with the command that makes training lines of it.

    None for training lines, malformed ones too, and for what is nothing that can be read.
    """
    try:
        kind = kind_of(path)
        with closing(read(str(path))) as samples:
            sample = {} if kind == "parquet" else next(samples, None)
    except (OSError, InputError):
        return None
    if kind != "parquet":
        is_lines = kind == "JSON" and isinstance(sample, dict) and {"image_path", "question"} <= sample.keys()
        if is_lines or not isinstance(sample, dict) or not sample:
            return None
        if kind == "CSV" and path.suffix not in (".csv", ".tsv") and untold(sample, {}):
            return None
    names = (path.with_name(f"{path.stem}{end}.jsonl") for end in ("", "_lines", "_converted"))
    target = next((name for name in names if not name.exists()), "TARGET.jsonl")
    command = shlex.join(["python", "-m", "moondream2.convert", str(path), str(target)])
    flags = "".join(f" --{part}_key KEY" for part in untold(sample, {})) if sample else ""
    return f"{path} is {kind}{f' with keys {keys_in(sample)}' if sample else ''}: {command}{flags} makes lines of it"


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


def key_of(part, sample, named):
    """The key of a sample's image, question or answer: the one that is named, else the first known; None if none."""
    return next((key for key in ([named[part]] if named.get(part) else KNOWN[part]) if key in sample), None)


def list_in(sample, keys):
    """The list of dictionaries under one of these keys, which may be stored as a dictionary of lists; None if none."""
    for value in map(sample.get, keys):
        if isinstance(value, dict) and all(isinstance(each, list) for each in value.values()):
            value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=False)]
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return value
    return None


def untold(sample, named):
    """Which of image, question and answer a sample's keys don't tell."""
    if list_in(sample, TURNS) and not named.get("question"):
        return []  # the picture may lie in the turns, and a conversation without one is skipped
    parts = ["image"] if list_in(sample, PAIRS) else list(KNOWN)
    return [part for part in parts if key_of(part, sample, named) is None]


def keys_in(sample):
    """A sample's keys in a line."""
    keys = [key if key.isprintable() else ascii(key) for key in map(str, sample)]
    return ", ".join(key[:40] for key in keys[:20]) + (", …" if len(keys) > 20 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def kind_of(path):
    """What a file is, by its beginning."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    return {b"[": "a JSON array", b"{": "JSON"}.get(head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1], "CSV")


def read(source, split="train", subset=None):
    """The samples of a file, a folder or a dataset on the hub, one after another.

    JSON and CSV are read here, as they stand: `datasets` makes of "2024-05-01" a time, of 007 a 7, and of a 1 in a
    column with 2.5 a 1.0.

    Raises:
        InputError: it can't be read.
    """
    path = Path(source)
    try:
        if not path.exists() and (path.suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
            raise InputError(f"there is no file or folder {source}, and a dataset on the hub is owner/name")
        kind = kind_of(path) if path.is_file() else None
        if kind in (None, "parquet"):
            yield from read_dataset(source, split, subset)
        else:
            yield from read_csv(path) if kind == "CSV" else read_json(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from None


def read_json(path):
    """The values of a JSON file: of one array, or one below the other, a line each or pretty-printed."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    with path.open(encoding="utf-8-sig") as file:
        text = ""
        while not text and (more := file.read(CHUNK)):
            text = more.lstrip()
        is_array = text.startswith("[")
        at, number = int(is_array), 1
        while True:
            at = gap.match(text, at).end()
            if is_array and text.startswith("]", at):
                return
            try:
                value, at = decode(text, at)
            except ValueError as error:  # perhaps it goes on behind what has been read
                more = file.read(max(CHUNK, len(text)))
                if not more and at == len(text) and not is_array:
                    return
                if not more:
                    raise InputError(f"{path}: sample {number} is not JSON, or is cut off: {error}") from None
                text, at = text[at:] + more, 0
            else:
                yield value
                number += 1


def read_csv(path):
    """The rows of a CSV file as dictionaries of texts; its first line names the columns."""
    csv.field_size_limit(1 << 30)  # characters: a cell may hold a picture
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = max(",;\t", key=file.readline().count)
        file.seek(0)
        yield from csv.DictReader(file, delimiter=separator, strict=True)


def read_dataset(source, split, subset):
    """The samples of what `datasets` reads, pictures as their bytes or path."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} is read by a library that training does without: pip install {DATASETS}") from None

    def undecoded(feature):
        if isinstance(feature, dict):
            return {name: undecoded(each) for name, each in feature.items()}
        if hasattr(feature, "feature"):  # a list of these
            return type(feature)(undecoded(feature.feature))
        return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it raises, too
    try:
        if Path(source).is_file():  # without a copy in the cache
            found = datasets.load_dataset("parquet", data_files=glob.escape(source), split="train", streaming=True)
        else:
            found = datasets.load_dataset(source, subset, split=split).to_iterable_dataset()
        classes = {name: each for name, each in found.features.items() if isinstance(each, datasets.ClassLabel)}
        for name, feature in found.features.items():
            found = found.cast_column(name, undecoded(feature))
        for sample in found:
            for name in classes:  # a class is stored as its number
                sample[name] = None if sample[name] is None else classes[name].int2str(sample[name])
            yield sample
    except Exception as error:  # whatever the libraries below raise
        message = " ".join(str(error).split())
        hint = " (--subset NAME picks it)" if "Config name" in message else ""
        raise InputError(f"cannot read {source}: {message}{hint}") from None
