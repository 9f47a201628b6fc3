"""Files and folders that are written whole or not at all, and JSON that every reader accepts."""

import contextlib
import json
import math
import os
import re
import shutil
import sys
import uuid

from moondream2.cli import InputError


def sync(path):
    """Flushes a file or folder to the disk."""
    is_windows = sys.platform == "win32"  # which opens no folder, and flushes only a file that is open for writing
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unfinished(path):
    """A new name beside `path`, for what is being written or removed there."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def name_of_unfinished(name):
    """The name of what is being written or removed, or was when its process died, as `name`; None if that is none."""
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.part", name)
    return match and match[1]


def remove_whole(path):
    """Removes a folder so that it is there whole or, whenever the process dies, not under its name."""
    aside = unfinished(path)
    path.replace(aside)
    remove(aside)


@contextlib.contextmanager
def write_whole(path, durable=True):
    """Gives a path beside `path` to write a file or fill a folder at, then puts it in its place in one step.

    Whatever goes wrong, and whenever the process dies, `path` is what it was before or whole; a folder that is to be
    replaced may also be gone. Not `durable`, it may be half there after a power cut: for what carries a checksum.

    Raises:
        InputError: the disk is full, or the folder can't be written to.
    """
    beside = unfinished(path)
    try:
        try:
            yield beside
            if durable:
                for file in sorted(beside.rglob("*")) if beside.is_dir() else []:
                    sync(file)
                sync(beside)
            if beside.is_dir():
                remove(path)
            beside.replace(path)
            if durable:
                sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(beside)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:  # torch and safetensors have write errors of their own kinds
        if any(word in str(error) for word in ("os error", "PytorchStreamWriter", "I/O error", "file write")):
            raise InputError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
        raise


def write_text(path, text):
    """Writes a text in UTF-8, its lines' ends the same on every system."""
    with write_whole(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def is_finite(number):
    """Whether it is a number, and neither infinite nor NaN."""
    return number is not None and math.isfinite(number)


def to_json(value):
    """The JSON of dictionaries, lists, texts and numbers; a number that is not finite, which JSON lacks, is null."""

    def checked(value):
        if isinstance(value, dict):
            return {name: checked(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [checked(each) for each in value]
        return value if not isinstance(value, float) or is_finite(value) else None

    return json.dumps(checked(value), allow_nan=False)
