"""Reading lines of data: every malformed line is named, with what is wrong with it, before anything else happens."""

import json
from typing import NamedTuple

from moondream2.cli import InputError
from moondream2.modeling_moondream2 import answer_text, prompt_text


class Line(NamedTuple):
    """A line of a data file: `source` is its file:line; the texts are stripped."""

    source: str
    image_path: str
    question: str
    answer: str

    @property
    def answers(self):
        return (self.answer,)


class Example(NamedTuple):
    """A line that can be trained on: `picture` is the key of what its picture shows, an answer's ids end with EOS."""

    source: str
    image_path: str
    question: str
    answer: str
    picture: str
    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def answers(self):
        return (self.answer,)


def tokenize(lines, tokenizer):
    """(prompt ids, answer ids) of each line, tokenized apart, so that the loss falls on exactly the answer."""
    if not lines:
        return []
    prompts, answers = [prompt_text(line.question) for line in lines], [answer_text(line.answer) for line in lines]
    prompts, answers = (tokenizer(texts, add_special_tokens=False).input_ids for texts in (prompts, answers))
    return [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers, strict=True)]


def read_lines(path):
    """The Lines of a JSONL file, without the blank ones.

    Raises:
        InputError: the file can't be read, or lines are malformed; the first ten are named.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    found, wrong = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(Line(f"{path}:{number}", *parse_line(line)))
            except ValueError as error:
                wrong.append(f"  {path}:{number}: {error}")
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise InputError("\n".join([f"{len(wrong)} malformed lines in {path}", *wrong[:10]]) + more)
    return found


def parse_line(line):
    """Picture, question and answer of a line; raises ValueError that says what is wrong with it."""
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    texts = []
    for name in ("image_path", "question", "answer"):
        text = record.get(name)
        if not isinstance(text, str):
            raise ValueError(f'"{name}" is {"missing" if name not in record else "not a text"}')
        if not text.strip():
            raise ValueError(f'"{name}" is empty')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f'"{name}" holds half a character (a lone surrogate)')
        texts.append(text.strip())
    return texts
