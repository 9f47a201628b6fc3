"""Reading lines of data: every malformed line is named, with what is wrong with it, before anything else happens."""

import copy
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from moondream2.cli import InputError
from moondream2.foreign import described
from moondream2.pictures import nearest
from moondream2.scoring import most_frequent


class Line(NamedTuple):
    """A line of a data file: `source` is its file:line; the texts are stripped.

    `answers` are all that count as right, the one that is trained on first. It has none, and a text is empty, where
    the line says so: it is a line then, but nothing can be learned from it.
    """

    source: str
    image_path: str
    question: str
    answers: tuple[str, ...]

    @property
    def lacks(self):
        """What can't be used in it as a reason to skip it, or None."""
        texts = {"image_path": self.image_path, "question": self.question, "answer": self.answers}
        return next((f"{name} empty" for name, text in texts.items() if not text), None)

    @property
    def is_only_asked(self):
        """Whether it lacks an answer, and nothing else."""
        return bool(self.image_path and self.question) and not self.answers


class Example(NamedTuple):
    """A line that can be trained on: `picture` is the key of what its picture shows, an answer's ids end with EOS."""

    source: str
    image_path: str
    question: str
    answers: tuple[str, ...]
    picture: str
    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def answer(self):
        """The answer that is trained on."""
        return self.answers[0]

    @property
    def key(self):
        """A name for what it says, wherever it stands."""
        words = json.dumps([self.picture, self.question, self.answers])
        return hashlib.sha256(words.encode()).hexdigest()[:16]


def tokenize(lines, config, tokenizer):
    """(prompt ids, answer ids) of each line, tokenized apart, so that the loss falls on exactly the answer."""
    prompts = config.prompt_ids([line.question for line in lines], tokenizer)
    answers = config.answer_ids([line.answers[0] if line.answers else "" for line in lines], tokenizer)
    return list(zip(prompts, answers, strict=True))


def hold_out(dataset):
    """Takes a tenth of a dataset's pictures out of it, with all their questions: a dataset of their own, to judge by.

    Which ones, their contents decide, whose digests are their keys: the same in any order of the lines, and whatever
    the files are called.

    Raises:
        InputError: there is only one picture.
    """
    keys = sorted(dataset.pictures)
    if len(keys) == 1:
        raise InputError(f"{dataset.path} has one picture, and none to judge by: add others, or give a VALID_FILE")
    keys = set(keys[: max(1, round(len(keys) / 10))])
    held = copy.copy(dataset)
    held.path, held.skipped = Path(f"a tenth of {dataset.path.name}"), []
    for each, is_held in ((held, True), (dataset, False)):
        each.examples = [example for example in dataset.examples if (example.picture in keys) is is_held]
        each.pictures = {key: picture for key, picture in dataset.pictures.items() if (key in keys) is is_held}
    return held


def read_lines(path, end_of_text, is_labelled=True):
    """The Lines of a JSONL file, without the blank ones.

    Args:
        end_of_text: the text of the tokenizer's last token, which some formats put behind each answer. There it is
            taken off, for the model's own is put behind every answer.
        is_labelled: False where a line may go without "answer".
    Raises:
        InputError: the file can't be read, is in another form, or lines are malformed; the first ten are named.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        near = None if path.exists() else nearest(path.parent, path.name)
        raise InputError(f"cannot read {path}: {error.strerror}" + (f"; nearest is {near}" if near else "")) from None
    found, wrong = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(Line(f"{path}:{number}", *parse_line(line, end_of_text, is_labelled)))
            except ValueError as error:
                wrong.append(f"  {path}:{number}: {error}")
    if wrong and not found and (form := described(path)):
        raise InputError(form)
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        count = f"{len(wrong):,} of {len(wrong) + len(found):,} lines malformed"
        raise InputError("\n".join([f"{path}: {count}", *wrong[:10]]) + more)
    return found


class Number(str):
    """A number of a line, as it is written there."""


def parse_line(line, end_of_text, is_labelled):
    """Picture, question and answers of a line; raises ValueError that says what is wrong with it."""
    try:
        numbers = {"parse_int": Number, "parse_float": Number, "parse_constant": no_number}
        record = json.loads(line, object_pairs_hook=distinct, **numbers)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for name in ("image_path", "question", *(["answer"] if is_labelled else [])):
        if name not in record:
            raise ValueError(f'"{name}" is missing')
    texts = [text_of(record[name], name) for name in ("image_path", "question")]
    return [*texts, answers_of(record.get("answer"), end_of_text)]


def distinct(pairs):
    """The dictionary of an object's pairs. Of a key that stands there twice, json would take the last alone."""
    record = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"{json.dumps(name)} stands twice in it: two examples in one?")
        record[name] = value
    return record


def no_number(word):
    raise ValueError(f"not JSON: {word} is no number")


def text_of(value, name):
    """A text, stripped; null is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, Number):
        raise ValueError(f'"{name}" is not a text')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f'"{name}" holds half a character (a lone surrogate)')
    return value.strip()


def answers_of(value, end_of_text):
    """All that count as right, the most frequent one first, of a text, a number, true or false, or a list of these."""
    texts = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool | Number):
            each = str(each).lower() if isinstance(each, bool) else str(each)
        text = text_of(each, "answer")
        while text.endswith(end_of_text):
            text = text.removesuffix(end_of_text).rstrip()
        texts += [text] if text else []
    return tuple(dict.fromkeys([most_frequent(texts), *texts])) if texts else ()
