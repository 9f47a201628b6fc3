"""Every constant of a script's block is also a flag of the same name in lower case.

A constant is an annotated name in capitals, `EPOCHS: int = 5  # passes over the training data`: the annotation is its
type, the comment behind it its help text.
"""

import argparse
import difflib
import io
import math
import sys
import tokenize
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import get_args, get_origin


class InputError(Exception):
    """Something the person who runs the script can mend; the message says what, where and how."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(module, argv, may_be_zero=(), below_one=(), choices=None):
    """The constants of a module's namespace, overridden by the flags in `argv`, as attributes in lower case.

    Args:
        module: the script's `globals()`.
        argv: the command line's words.
        may_be_zero: names of the numbers that may be 0; all others are more than that.
        below_one: names of the numbers that are less than 1.
        choices: {name: the values that it may have}.
    Raises:
        InputError: an unknown flag, or a value that is not of the constant's type or range, in `argv` or in the block.
    """
    types = {name: kind for name, kind in module["__annotations__"].items() if name.isupper()}
    helps = comments(Path(module["__file__"]))
    parser = Parser(
        prog=Path(module["__file__"]).name,
        description=f"{module['__doc__'].splitlines()[0]} Each flag is a constant at the top of the file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name in types:
        text = helps.get(name, "").replace("%", "%%")
        parser.add_argument(f"--{name.lower()}", default=module[name], help=text, metavar="")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        like = difflib.get_close_matches(flag, [f"--{name.lower()}" for name in types], n=1)
        hint = f"did you mean {like[0]}?" if like else "--help lists all flags"
        raise InputError(f"unknown flag {flag}: {hint}")

    given = {word.split("=")[0] for word in argv}
    values = {}
    for name, kind in types.items():
        value = getattr(arguments, name.lower())
        if f"--{name.lower()}" in given:
            value = from_text(name, value, kind)
        limit = 1 if name in below_one else math.inf
        check(name, value, kind, name in may_be_zero, limit, (choices or {}).get(name))
        values[name.lower()] = value
    return SimpleNamespace(**values)


def comments(path):
    """{name: the comment behind it} for the lines of a file that begin with a name in capitals."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        name = token.line.split(":")[0]
        if token.type == tokenize.COMMENT and name.isupper() and name.isidentifier():
            found[name] = token.string.lstrip("# ")
    return found


def from_text(name, text, kind):
    """A flag's text as the constant's type; "none" where a constant may be None."""
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    if NoneType in kinds and text.lower() == "none":
        return None
    kind = kinds[0]
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if get_origin(kind) is tuple:
            return tuple(float(part) for part in text.strip("()").split(","))
        return text if kind is bool else kind(text)
    except ValueError:
        return text  # of the wrong type, which check() says


def check(name, value, kind, may_be_zero, limit, choices):
    """Raises InputError unless `value` is of the annotated type, in range, under `limit`, and one of the choices."""
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    if value is None and NoneType in kinds:
        return
    kind = kinds[0]
    parts = value if get_origin(kind) is tuple and isinstance(value, tuple) else (value,)
    part_kinds = get_args(kind) if get_origin(kind) is tuple else (kind,)
    wanted = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}.get(kind, "two numbers")
    wanted += " or None" if NoneType in kinds else ""
    if len(parts) != len(part_kinds):
        raise InputError(f"{name} must be {wanted}, not {value!r}")
    for part, part_kind in zip(parts, part_kinds, strict=True):
        is_number = part_kind in (int, float)
        accepted = (int, float) if part_kind is float else part_kind
        if not isinstance(part, accepted) or (is_number and isinstance(part, bool)):
            raise InputError(f"{name} must be {wanted}, not {value!r}")
        if is_number and not (part < limit and (part > 0 or (may_be_zero and part == 0))):
            scope = "0 or more" if may_be_zero else "more than 0"
            scope += f" and less than {limit}" if limit < math.inf else ""
            raise InputError(f"{name} must be {wanted}, {scope}, not {value!r}")
        if part_kind is str and not part.strip():
            raise InputError(f"{name} must not be empty")
    if choices and value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def run(main):
    """Runs `main`; what a person can mend ends the program with one line and status 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a disk that went away, a folder that no longer lets in
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {where}{error.strerror or error}")
