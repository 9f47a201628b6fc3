"""Reading lines of data: every malformed line is named, with what is wrong with it, before anything else happens."""

import json

from moondream2.cli import InputError

FIELDS = ("image_path", "question", "answer")


def read_lines(path):
    """(place, texts) for each line of a JSONL file: its file:line and a dictionary of its FIELDS, stripped.

    Raises:
        InputError: the file can't be read, or lines are malformed; the first ten are named.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    examples, wrong = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                examples.append((f"{path}:{number}", parse_line(line)))
            except ValueError as error:
                wrong.append(f"  {path}:{number}: {error}")
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise InputError("\n".join([f"{len(wrong)} malformed lines in {path}", *wrong[:10]]) + more)
    return examples


def parse_line(line):
    """The three texts of a line; raises ValueError that says what is wrong with it."""
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
    texts = {}
    for name in FIELDS:
        text = record.get(name)
        if not isinstance(text, str):
            raise ValueError(f'"{name}" is {"missing" if name not in record else "not a text"}')
        if not text.strip():
            raise ValueError(f'"{name}" is empty')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f'"{name}" holds half a character (a lone surrogate)')
        texts[name] = text.strip()
    return texts
