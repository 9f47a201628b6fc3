"""Pictures on disk: where they lie, what is in them, and whether they can be used."""

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import time
import unicodedata
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from tqdm import tqdm

from moondream2.cli import InputError
from moondream2.files import write_whole
from moondream2.modeling_moondream2 import MAX_PIXELS, decode_smaller
from moondream2.summary import printable

# A bomb is a small file that unpacks to gigabytes: what would be decoded to more than MAX_PIXELS is refused.
MAX_JPEG_PIXELS = 4 * MAX_PIXELS  # as stored: it is decoded at half its width and height then
MAX_PNG_TEXT = 2**26  # bytes of a PNG's colour profile or a text in it; Pillow's own limit is 2**20
LEAST_ROWS = 0.95  # of a JPEG that lacks its last bytes; with fewer it is broken
HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # in bytes 8 to 12 of such files
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Threads that read and decode: both leave Python to the other threads meanwhile. A machine's processes share its cores.
THREADS = max(1, min(32, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
AHEAD = 16  # micro-batches that are read before they are asked for: enough, and they take memory
LONGEST_SHOWN = 80  # characters of a picture's path, in a reason
NOT_FOUND = "picture not found"
LEAST_CONTRAST = 16  # of 255 levels, in any colour: 12 bits that were exported as 16 have 15
# What is said of a picture that is used all the same. By these texts pictures are counted.
SCALED = "pictures of more than 8 bits, scaled to 8"
CLIPPED = "pictures with values below black, above white or NaN, clipped"
CUT = "JPEGs without their last bytes, used all the same"
FLAT = "pictures of almost one colour, perhaps badly exported"
JUST_CHANGED = 2  # seconds: within them a file may change again and keep its time of change


class PictureError(Exception):
    """A picture that can't be used; the message says why. Those of the same `kind` are counted as one reason."""

    def __init__(self, message="", kind="picture broken"):
        super().__init__(message)
        self.kind = kind

    def reason(self, name):
        """Why a line whose picture is called `name` is left out: "picture broken: images/a.jpg: it ends early"."""
        return ": ".join(part for part in (self.kind, shown(name), str(self)) if part)


class BrokenPicture(PictureError):
    """A picture that can't be decoded, whenever it is tried."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies, what is in it (the SHA-256 of its file), and its (width, height) as stored."""

    path: Path
    key: str
    size: tuple[int, int]


def shown(name):
    """A picture's path as a person can read it: on one line, without its middle where it is too long."""
    half = LONGEST_SHOWN // 2
    return printable(name if len(name) <= LONGEST_SHOWN else f"{name[:half]}…{name[-half + 1 :]}")


def find_picture(jsonl, name):
    """Where a picture lies: beside the JSONL file, else in the working directory; None where it is no file.

    A path that is no file as it stands is tried in the other ways that people and programs write it.
    """
    for spelling in (name,) if is_inline(name) else spellings(name):
        for file in (jsonl.parent / spelling, Path(spelling)):
            if os.path.isfile(file):  # noqa: PTH113, swallows odd names
                return file
    return None


def spellings(name):
    """A path as it stands, then as Windows, a shell, a browser or another file system's Unicode would have meant it."""
    found = {name: None}  # in order
    for change in (
        lambda name: name.replace("\\", "/"),
        lambda name: os.path.expanduser("~") + name[1:] if name.startswith("~/") else name,  # noqa: PTH111
        lambda name: re.sub("^file:(//(localhost)?)?(/(?=[a-z]:))?", "", name, flags=re.IGNORECASE),
        unquote,
        lambda name: unicodedata.normalize("NFC", name),
        lambda name: unicodedata.normalize("NFD", name),
    ):
        found |= dict.fromkeys(change(each) for each in list(found))
    return found


def is_inline(name):
    """Whether it is no path but a picture itself, in base64."""
    return name[:5].lower() == "data:" or len(name) > 200 and re.fullmatch(r"[\w+/=\r\n-]+", name, re.ASCII) is not None


def what_is(name):
    """The PictureError that says what is wrong with a path where no file is."""
    if is_inline(name):
        return PictureError("write it to a file, and give that file's path", "picture is base64, not a path")
    if re.match(r"(?!file:)[a-z][\w+.-]*://", name, re.IGNORECASE):
        return PictureError("download it, and give that file's path", "picture is an address, not a path")
    return PictureError(kind=NOT_FOUND)


def find_pictures(jsonl, lines, known, check_stop=lambda: None):
    """{image_path: its Picture, or the PictureError that says why there is none}."""
    files = {name: find_picture(jsonl, name) for name in dict.fromkeys(line.image_path for line in lines)}
    refuse_missing(jsonl, [line for line in lines if line.image_path and files[line.image_path] is None], len(lines))
    pictures = known.look_at({file for file in files.values() if file is not None}, check_stop)
    return {name: what_is(name) if file is None else pictures[file] for name, file in files.items()}


def set_up_pillow():
    """Pillow's settings for this process, for whoever starts a run: they are the same for all threads."""
    warnings.filterwarnings("ignore", module="PIL")  # of files that are read all the same; broken ones are named
    Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS  # `open_image` is stricter
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_PNG_TEXT
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def open_image(file):
    """Pillow's image of an open file, not decoded yet.

    Raises:
        PictureError: it has too many pixels, or what reads it is not installed.
        Exception: any other of Pillow's, where it is no picture.
    """
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise PictureError(first_line(error), "picture too large") from error
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in HEIF and "HEIF" not in Image.OPEN:
            raise PictureError("pip install pillow-heif, which reads HEIC", "picture needs a package") from None
        raise
    most = MAX_JPEG_PIXELS if isinstance(image, JpegImageFile) else MAX_PIXELS
    if image.width * image.height > most:
        raise PictureError(f"{image.width} x {image.height} pixels are more than {most:,}", "picture too large")
    return image


def refuse_missing(jsonl, missing, lines):
    """Raises InputError where more than half of the lines name a picture that is not there.

    Some pictures may be lost, and training goes on without them. Where most are, it is the paths that are wrong, and
    a model trained on what happens to be found would not be the one that was asked for.
    """
    if 2 * len(missing) > lines:
        first, where = missing[0], ""
        error = what_is(first.image_path)
        if error.kind == NOT_FOUND:
            near = nearest(jsonl.parent, first.image_path)
            folders = " and ".join(dict.fromkeys(str(folder.absolute()) for folder in (jsonl.parent, Path())))
            where = f", looked for in {folders}" + (f"; nearest is {near}" if near else "")
        raise InputError(
            f"{len(missing):,} of {lines:,} lines in {jsonl} have no picture that is there, such as {first.source}: "
            f"{error.reason(first.image_path)}{where}"
        )


def nearest(folder, name, most=10_000):
    """The file of the nearest name among the first so many below a folder, or None."""
    files = [path.relative_to(folder).as_posix() for path in islice(folder.rglob("*"), most)]
    wanted = name.replace("\\", "/").split("/")[-1].casefold()
    same = [file for file in files if file.split("/")[-1].casefold() == wanted]
    return next(iter(same or difflib.get_close_matches(name, files, n=1)), None)


def look(path):
    """The Picture at `path`, which is read as a whole but not decoded: its size stands at the beginning of the file.

    Raises:
        PictureError: it can't be read, is no picture, or has too many pixels.
    """
    try:
        with path.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
            with open_image(file) as image:
                return Picture(path, key, image.size)
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(first_line(error)) from error


def open_picture(path, use, key=None, draft=None):
    """`use(image)` of the picture at `path`, decoded, and whether it lacks its last bytes.

    Args:
        draft: the (width, height) that are enough: a JPEG may be decoded at a fraction of its size.
    Raises:
        BrokenPicture: it can't be decoded.
        PictureError: its file can't be read, or holds another content than `key` says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PictureError(first_line(error)) from error
    if key not in (None, hashlib.sha256(content).hexdigest()):
        raise PictureError("the file has changed since it was first looked at")
    return open_content(content, use, draft)


def open_content(content, use, draft=None):
    """What `open_picture` gives, of a file's bytes; raises as it does."""
    try:
        image, is_cut = decode(content, draft)
        return use(image), is_cut
    except PictureError:
        raise
    except MemoryError as error:  # another time there may be more
        raise PictureError("decoding it takes more memory than there is") from error
    except Exception as error:  # Pillow raises some fifteen kinds on broken files, each meaning the same here
        raise BrokenPicture(first_line(error)) from error


def decode(content, draft=None):
    """The decoded image in a file's bytes, and whether it is a JPEG that lacks its last ones."""

    def load(content):
        image = open_image(io.BytesIO(content))
        if draft is not None:
            image.draft(None, draft)
        decode_smaller(image)
        image.load()
        return image

    try:
        return load(content), False
    except OSError:
        if not content.startswith(b"\xff\xd8"):
            raise
        # Pillow's LOAD_TRUNCATED_IMAGES would do the same, for all threads and all formats.
        image = load(content + b"\xff\xd9")  # the end that it lacks: what is missing before it becomes grey
    rows = rows_there(image, content) / image.height
    if rows < LEAST_ROWS:
        raise BrokenPicture(f"the file ends early: {rows:.0%} of the picture's rows are there")
    return image, True


def rows_there(image, content):
    """How many rows of a JPEG were decoded before its bytes ended; rows from there on are grey at their right end.

    A progressive one, which begins with a coarse picture, has none until all its detail has come at least once.
    """
    if image.info.get("progressive") and not is_detailed(content):
        return 0
    end = np.asarray(image)[:, -8:].reshape(image.height, -1)
    is_grey = ((end == 127) | (end == 128)).all(axis=1)  # 127 where colours are stored inverted
    return image.height - int(np.logical_and.accumulate(is_grey[::-1]).sum())


def is_detailed(content):
    """Whether the whole scans of a progressive JPEG hold all 64 frequencies of each of its components.

    Source: ITU-T T.81, B.2.2 (the frame's header) and B.2.3 (that of a scan).
    """
    frame = content[content.rfind(b"\xff\xc2") :]
    found = set()
    for scan in [match.end() for match in re.finditer(rb"\xff\xda\x00", frame)][:-1]:
        count = frame[scan + 1]
        *components, first, last, bits = frame[scan + 2 : scan + 2 + 2 * count : 2] + frame[scan + 2 + 2 * count :][:3]
        if bits < 16:  # else it refines what has come before
            found |= {(component, k) for component in components for k in range(first, last + 1)}
    return bool(found) and len(found) == 64 * frame[9]


def pixels_of(picture, preprocess):
    """`preprocess(image)` of a picture, if its file still holds what it did; raises as `open_picture` does."""
    return open_picture(picture.path, preprocess, picture.key)[0]


def examine(picture, preprocess):
    """What `pixels_of` gives, and a list of what is to be said of the picture."""

    def use(image):
        pixels = preprocess(image)
        whole = pixels[0] if isinstance(pixels, tuple) else pixels  # (3, height, width) in [-1, 1]
        contrast = (whole.amax((1, 2)) - whole.amin((1, 2))).max() * 127.5
        return pixels, [*remarks_on_values(image), *([FLAT] if contrast < LEAST_CONTRAST else [])]

    (pixels, remarks), is_cut = open_picture(picture.path, use, picture.key)
    return pixels, [*remarks, *([CUT] if is_cut else [])]


def remarks_on_values(image):
    """What becomes of grey values of more than 8 bits, by the rule of the model's `to_8_bits`."""
    if image.mode.startswith(("I", "F")):
        yield SCALED
        values = np.asarray(image)
        if values.min() < 0 or image.mode == "F" and not (values <= 255).all():  # NaN is neither
            yield CLIPPED


def first_line(error):
    return printable(f"{type(error).__name__}: {error}".splitlines()[0])[:200]


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


def read_ahead(function, items, threads=THREADS, ahead=AHEAD):
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
