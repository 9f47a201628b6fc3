"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
import uuid

from moondream2.cli import InputError


def sync(path):
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def write_whole(path, durable=True):
    """Gives a path beside `path` to write a file or fill a folder at, then puts it in its place in one step.

    Whatever goes wrong, and whenever the process dies, `path` is what it was before or whole; a folder that is to be
    replaced may also be gone. Not `durable`, it may be half there after a power cut: for what carries a checksum.

    Raises:
        InputError: the disk is full, or the folder can't be written to.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
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
    with write_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
