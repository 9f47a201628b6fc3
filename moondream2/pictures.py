"""Pictures on disk: where they lie, what is in them, and whether they can be used."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from moondream2.cli import InputError
from moondream2.files import write_whole

# A bomb is a small file that unpacks to gigabytes. From this size on Pillow warns; here it is an error.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
THREADS = min(8, os.cpu_count() or 1)  # that read and decode: both leave Python to the other threads meanwhile
JUST_CHANGED = 2  # seconds: within them a file may change again and keep its time of change


class PictureError(Exception):
    """A picture that can't be used; the message says why."""


class BrokenPicture(PictureError):
    """A picture that can't be decoded, whenever it is tried."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies, what is in it (the SHA-256 of its file), and its (width, height) as stored."""

    path: Path
    key: str
    size: tuple[int, int]


def find_picture(jsonl, name):
    """Where a picture lies: beside the JSONL file, else in the working directory; None where it is no file."""
    candidates = (jsonl.parent / name, Path(name))
    return next((file for file in candidates if os.path.isfile(file)), None)  # noqa: PTH113, swallows odd names


def find_pictures(jsonl, lines, known, check_stop=lambda: None):
    """{image_path: its Picture, the PictureError that says what is wrong with it, or None where it is no file}."""
    files = {name: find_picture(jsonl, name) for name in dict.fromkeys(line.image_path for line in lines)}
    pictures = known.look_at({file for file in files.values() if file is not None}, check_stop)
    return {name: pictures.get(file) for name, file in files.items()}


def look(path):
    """The Picture at `path`, which is read as a whole but not decoded: its size stands at the beginning of the file.

    Raises:
        PictureError: it can't be read, is no picture, or has too many pixels.
    """
    try:
        with path.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
            with Image.open(file) as image:
                width, height = image.size
    except Exception as error:
        raise PictureError(first_line(error)) from error
    if width * height > MAX_PIXELS:
        raise PictureError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
    return Picture(path, key, (width, height))


def open_picture(path, use, key=None):
    """`use(image)` of the picture at `path`, and its content's key.

    Raises:
        BrokenPicture: it can't be decoded.
        PictureError: its file can't be read, or holds another content than `key` says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PictureError(first_line(error)) from error
    found = hashlib.sha256(content).hexdigest()
    if key not in (None, found):
        raise PictureError("the file has changed since it was first looked at")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return use(image), found
    except MemoryError as error:  # another time there may be more
        raise PictureError("decoding it takes more memory than there is") from error
    except Exception as error:  # Pillow raises some fifteen kinds on broken files, each meaning the same here
        raise BrokenPicture(first_line(error)) from error


def pixels_of(picture, preprocess):
    """`preprocess(image)` of a picture, if its file still holds what it did; raises as `open_picture` does."""
    return open_picture(picture.path, preprocess, picture.key)[0]


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


class KnownPictures:
    """The pictures that earlier runs have met, told by path, size and time of change, as make and git tell files.

    They are listed in a file in `folder`, which runs may share; without a folder (None) nothing is known. A file that
    is replaced by one of the same size and time of change is taken for the old one; `touch` makes it a new one.
    """

    def __init__(self, folder):
        self.index = None if folder is None else Path(folder) / "known_pictures.json"

    def look_at(self, files, check_stop=lambda: None):
        """{file: its Picture, or the PictureError that says why it can't be used}.

        Of a known file only size and time are asked; a new or changed one is read, once.

        Args:
            check_stop: called between files; raises to end the pass. What has been read by then is known to the next.
        """
        known, new, found = self.read(), {}, {}

        def picture_in(file):
            try:
                now, status = time.time(), file.stat()
                path, stamp = os.path.abspath(file), [status.st_size, status.st_mtime_ns]  # noqa: PTH100, keeps links
                if path in known and known[path][:2] == stamp:
                    _, _, key, width, height = known[path]
                    return Picture(file, key, (width, height))
                picture = look(file)
            except OSError as error:
                return PictureError(first_line(error))
            except PictureError as error:
                return error
            if abs(now - status.st_mtime) > JUST_CHANGED:
                new[path] = [*stamp, picture.key, *picture.size]
            return picture

        files = sorted(files)
        try:
            with contextlib.closing(read_ahead(picture_in, files, ahead=8 * THREADS)) as looked:
                for file in tqdm(files, "Reading pictures", unit="", leave=False):
                    check_stop()
                    found[file] = next(looked)
        finally:
            if new and self.index is not None:
                self.write(new)
        return found

    def read(self):
        """{absolute path: [bytes, nanoseconds, key, width, height]}; empty where no such index can be read."""
        if self.index is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                index = json.loads(self.index.read_bytes())
                if isinstance(index, dict) and all(map(is_entry, index.values())):
                    return index
        return {}

    def write(self, new):
        """Adds to what is listed now, perhaps by another run; what the two write at the same moment is read again."""
        try:
            self.index.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(self.index, durable=False) as beside:
                beside.write_text(json.dumps(self.read() | new), encoding="utf-8")
        except (OSError, InputError) as error:
            print(f"{error}: the next start reads all pictures again")


def is_entry(value):
    return isinstance(value, list) and [type(each) for each in value] == [int, int, str, int, int]


def read_ahead(function, items, threads=THREADS, ahead=2 * THREADS):
    """Yields `function(item)` for each item, in order; threads compute up to `ahead` of them before they are asked for.

    What `function` raises is raised where its result would be. When nobody asks any more (`close`), what has not begun
    is dropped.
    """
    pool, results = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > ahead:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
