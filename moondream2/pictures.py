"""Pictures on disk: where they lie, what is in them, and whether they can be used."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from moondream2.modeling_moondream2 import preprocess, upright_rgb

# A bomb is a small file that unpacks to gigabytes. From this size on Pillow warns; here it is an error.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS


class PictureError(Exception):
    """A picture that can't be used; the message says why."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies, what is in it (the SHA-256 of its file), and its (width, height) as stored."""

    path: Path
    key: str
    size: tuple[int, int]


def open_picture(path, use):
    """`use(image)` of the decoded picture at `path`, and its content's key.

    Raises:
        PictureError: it can't be read or decoded.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise PictureError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
                return use(image), digest.hexdigest()
    except PictureError:
        raise
    except Exception as error:  # Pillow's decoders raise some fifteen kinds on broken files, each meaning the same here
        raise PictureError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def inspect(path):
    """The Picture at `path`, decoded once as a whole to know that it can be."""
    size, key = open_picture(path, lambda image: (upright_rgb(image), image.size)[1])
    return Picture(path, key, size)


def pixels_of(picture, encoder):
    """The preprocessed tensor (3, height, width) of a picture, if its file still holds what it did."""
    pixels, key = open_picture(picture.path, lambda image: preprocess(image, encoder.image_size, encoder.tile_from))
    if key != picture.key:
        raise PictureError("the file has changed since the run began")
    return pixels


def find_picture(jsonl, name):
    """Where a picture lies: beside the JSONL file, else in the working directory; None where it is no file."""
    candidates = (jsonl.parent / name, Path(name))
    return next((file for file in candidates if os.path.isfile(file)), None)  # noqa: PTH113, swallows odd names


def inspect_all(files):
    """{file: its Picture, or the PictureError that says why it can't be used}; decodes each file once."""

    def look(file):
        try:
            return inspect(file)
        except PictureError as error:
            return error

    files = sorted(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked = tqdm(pool.map(look, files), "Reading pictures", len(files), unit="", leave=False)
        return dict(zip(files, looked, strict=True))
