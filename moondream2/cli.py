"""Every constant of a script's block is also a flag of the same name in lower case.

A constant is an annotated name in capitals, `EPOCHS: PositiveInt = 5  # passes over the training data`: the annotation
says which values it may have, the comment behind it is its help. A comment line that ends in dashes,
`# The machine ------`, is the heading of the constants below it, in the file as in `--help`.
"""

import argparse
import atexit
import difflib
import gc
import io
import re
import sys
import tokenize
from itertools import groupby
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Annotated, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Value = TypeVar("Value")
MayChange = Annotated[Value, "may change"]  # a run that goes on from a checkpoint may have another value
Share = Annotated[float, Field(gt=0, lt=1)]
CONFIG = ConfigDict(allow_inf_nan=False, str_strip_whitespace=True, str_min_length=1)  # no NaN, no empty text
PLAIN_WORDS = {  # in place of pydantic's
    "a valid integer": "a whole number",
    "a valid string": "a text",
    "a valid boolean": "True or False",
    "a valid tuple": "numbers with a comma between them",
    "Field required": "Tuple should have more items",
}


class InputError(Exception):
    """Something the person who runs the script can mend; the message says what, where and how."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(module, argv):
    """The constants of a module, overridden by the flags in `argv`, as attributes in lower case.

    Raises:
        InputError: an unknown flag, or a value that its annotation does not allow, in `argv` or in the module.
    """
    flags = read_flags(module, argv)
    plain = get_type_hints(module)  # without what Annotated adds
    values = {}
    for name, kind in annotations(module).items():
        flag = name.lower()
        value = from_text(flags[flag], plain[name]) if flag in flags else getattr(module, name)
        try:
            values[flag] = TypeAdapter(kind, config=CONFIG).validate_python(value, strict=flag not in flags)
        except ValidationError as error:
            said = flags.get(flag) or repr(value)
            raise InputError(f"{name} {in_plain_words(error.errors()[0]['msg'])}, not {said}") from None
    return SimpleNamespace(**values)


def may_change(module):
    """The names of the constants that may have another value when a run goes on from a checkpoint."""
    return {name for name, kind in annotations(module).items() if "may change" in getattr(kind, "__metadata__", ())}


def annotations(module):
    """{name: annotation} of the constants."""
    hints = get_type_hints(module, include_extras=True)
    return {name: hint for name, hint in hints.items() if name.isupper()}


def read_flags(module, argv):
    """{flag: text} of the flags that `argv` gives; the last one counts."""
    parser = Parser(
        prog=Path(module.__file__).name,
        usage="%(prog)s [--name value ...]",
        description=f"{module.__doc__.splitlines()[0]} Each flag is a constant at the top of the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    names, kinds, found = list(annotations(module)), get_type_hints(module), comments(module)
    for heading, group in groupby(names, lambda name: found[name][0]):
        arguments = parser.add_argument_group(heading)
        for name in group:
            text = f"{found[name][1]} (default: {getattr(module, name)})".replace("%", "%%")
            parts = kinds[name], *get_args(kinds[name])
            choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
            arguments.add_argument(f"--{name.lower()}", help=text, metavar="|".join(choices))
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        like = difflib.get_close_matches(flag.lower(), [f"--{name.lower()}" for name in names], n=1)
        hint = f"did you mean {like[0]}?" if like else "--help lists all flags"
        raise InputError(f"unknown flag {flag}: {hint}")
    return vars(flags)


def comments(module):
    """{name: (heading, comment)} for each name that begins a line of the module's file, up to its first definition."""
    found, heading, name = {}, None, None
    with tokenize.open(module.__file__) as file:
        for token in tokenize.generate_tokens(file.readline):
            begins_line = token.start[1] == 0
            if token.string in ("class", "def") and begins_line:
                break
            if token.type == tokenize.NAME and begins_line:
                name = token.string
                found[name] = heading, ""
            elif token.type == tokenize.COMMENT and not begins_line:
                found[name] = heading, token.string.lstrip("# ")
            elif title := re.fullmatch("# (.+?) -{3,}", token.string):
                heading = title[1]
    return found


def from_text(text, kind):
    """A flag's text in the form that pydantic converts: None for "none" where it is allowed, a tuple's items apart."""
    if text.lower() == "none" and NoneType in get_args(kind):
        return None
    return tuple(text.strip("()").split(",")) if get_origin(kind) is tuple else text


def in_plain_words(message):
    """Makes pydantic's "Input should be a valid integer, unable to parse string" a "must be a whole number"."""
    for words, plain in PLAIN_WORDS.items():
        message = message.replace(words, plain)
    return re.sub("^.+? should (.+?)(, (unable|got) .+| after validation.*)?$", r"must \1", message)


def run(main):
    """Runs `main`; what a person can mend ends the program with one line and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file; what its encoding lacks is printed as \u4e16
            stream.reconfigure(errors="backslashreplace")
    atexit.register(gc.freeze)  # lest Python look through all that was imported for garbage at its end, for a second
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell has it
    except OSError as error:  # a disk that went away, a folder that no longer lets in
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {where}{error.strerror or error}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not all that comes here has imported
            raise
        said = str(error).partition(". ")[0]
        sys.exit(f"error: {said}: docs/troubleshooting.md says how to take less")
