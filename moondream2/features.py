"""The store of picture features: what the frozen vision encoder says of a picture, computed once and kept on disk.

A picture's features lie in a file of their own, named by the picture's content, in a folder named by all that decides
them. So the next run starts at once, a changed picture or model is encoded anew, and runs may share the folder.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_map
from tqdm import tqdm

from moondream2.files import write_whole
from moondream2.launch import gather
from moondream2.modeling_moondream2 import PIXELS_VERSION
from moondream2.pictures import THREADS, BrokenPicture, PictureError, examine, pixels_of, read_ahead

# Pictures that go through the encoder together: always the same ones, though some be stored already, so that a resumed
# pass computes the same bits; and those of one data file, so that a TEST_FILE moves none of the others' bits.
CHUNK = 8


class FeatureStore:
    """Features by picture key, (729, 2048) each, memory-mapped when read; `folder` None keeps nothing.

    An entry carries a checksum; one that is damaged, of another shape or half-written counts as missing. Beside them
    lies what decoding told, where it told something: why a picture can't be used, or what is to be said of one that is.
    The model is on the device that it is to work on.
    """

    def __init__(self, folder, model):
        encoder, config = model.vision_encoder, model.config
        weight = next(encoder.parameters())
        self.shape, self.dtype = (config.image_tokens, config.text_config.hidden_size), weight.dtype
        self.entry_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self.preprocess, self.is_pinned = encoder.preprocess, weight.is_cuda
        self.key = encoder_key(encoder, config.vision_config)
        self.folder = None if folder is None else Path(folder) / self.key

    def path(self, key):
        return self.folder / key[:2] / f"{key}.safetensors"

    def reason_path(self, key):
        """Another version of Pillow may decode what this one can't: each has its own say."""
        return self.path(key).with_suffix(f".pillow-{PIL.__version__}.txt")

    def remarks_path(self, key):
        return self.path(key).with_suffix(".remarks.txt")

    def __contains__(self, key):
        """Whether an entry of the right size is there; only `load` reads it."""
        with contextlib.suppress(OSError):
            return self.folder is not None and self.path(key).stat().st_size > self.entry_bytes
        return False

    def load(self, key):
        """The features of a picture; None where there are none. A damaged entry goes: the next start makes another."""
        if key not in self:
            return None
        with contextlib.suppress(OSError):
            with contextlib.suppress(SafetensorError, KeyError, TypeError):
                with safe_open(self.path(key), framework="pt") as file:
                    features, checksum = file.get_tensor("features"), file.metadata()["crc32"]
                if features.shape == self.shape and features.dtype == self.dtype and crc32(features) == checksum:
                    return features
            self.path(key).unlink()
        return None

    def read(self, picture):
        """(features, None) of a picture or, where none are stored, (None, pixels): what `image_embeds` takes.

        Raises:
            PictureError: they are needed, and its file is gone, broken or another one.
        """
        features = self.load(picture.key)
        if features is None:
            return None, self.pixels(picture)
        return self.pinned(features), None

    def pixels(self, picture):
        return self.pinned(pixels_of(picture, self.preprocess))

    def pinned(self, tensors):
        """Tensors, in whatever they stand, as they are copied to the device while it works."""
        return tree_map(torch.Tensor.pin_memory, tensors) if self.is_pinned else tensors

    def save_all(self, features):
        """Stores the features {key: tensor} that are not stored yet."""
        for key, each in features.items():
            if key not in self:
                self.save(key, each)

    def save(self, key, features):
        features = features.cpu().contiguous()
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        with write_whole(self.path(key), durable=False) as path:
            save_file({"features": features}, path, metadata={"crc32": crc32(features)})

    def save_reason(self, key, reason):
        self.save_text(self.reason_path(key), reason)

    def reason(self, key):
        """Why a picture can't be decoded, if that is known; else None."""
        return self.folder and load_text(self.reason_path(key))

    def save_remarks(self, key, remarks):
        self.save_text(self.remarks_path(key), "\n".join(remarks))

    def remarks(self, key):
        """What is to be said of a picture whose features are stored: a list, mostly empty, as is its place then."""
        text = load_text(self.remarks_path(key)) if self.folder else None
        return text.splitlines() if text else []

    def save_text(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path, durable=False) as beside:
            beside.write_text(text, encoding="utf-8")

    def has_room(self, count, show):
        """Whether the features of `count` more pictures fit on the disk; what they take is said before."""
        if self.folder is None or not count:
            return not count
        self.folder.mkdir(parents=True, exist_ok=True)
        need, free = count * self.entry_bytes, shutil.disk_usage(self.folder).free
        if show:
            gb = need / 1e9
            print(f"Encoding {count:,} pictures into {self.folder} ({gb:,.3f} GB, {free / 1e9:,.1f} free)")
        if show and need > free:
            print("That does not fit: each of them will be encoded whenever it is needed instead.")
        return need <= free

    def others(self):
        """(folder, bytes) of each store beside this one."""
        beside = sorted(self.folder.parent.glob("*")) if self.folder else []
        for folder in beside:
            if folder != self.folder and folder.is_dir() and re.fullmatch("[0-9a-f]{16}", folder.name):
                files = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)  # noqa: PTH118
                yield folder, sum(os.lstat(file).st_size for file in files)


def load_text(path):
    """What a file holds; None where there is none that can be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return None


def crc32(tensor):
    return str(zlib.crc32(tensor.view(torch.uint8).numpy()))


def encoder_key(encoder, config):
    """A name for all that decides what an encoder says of a picture: weights, configuration, how pixels are made."""
    settings = {name: getattr(config, name) for name in config.defaults}
    digest = hashlib.sha256(json.dumps([PIXELS_VERSION, settings]).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.no_grad()
def image_embeds(reads, vision_encoder, device):
    """The features (pictures, 729, 2048) of what `store.read` gave of some pictures, on `device`; None of none.

    What came as pixels is encoded, where the encoder is, and not stored: training never waits for a disk.
    """
    pixels = [pixels for features, pixels in reads if features is None]
    encoded = iter(vision_encoder(pixels) if pixels else ())
    features = [next(encoded) if features is None else features for features, _ in reads]
    is_cuda = torch.device(device).type == "cuda"  # which keeps what it copies from until it has; others may not
    return torch.stack([each.to(device, non_blocking=is_cuda) for each in features]) if features else None


@torch.no_grad()
def encode_pictures(chunks, vision_encoder, store, together=iter, show=True):
    """Encodes and stores pictures, and what is to be said of them; returns {key: reason} of those that can't be used.

    Args:
        chunks: lists of Picture, each to go through the encoder at once.
        together: goes through the chunks in step with other processes; it may raise to end the pass, which a later
            run goes on with.
    """

    def decode(picture):
        try:
            pixels, remarks = examine(picture, store.preprocess)
            return store.pinned(pixels), remarks
        except PictureError as error:
            return error, []

    unusable = {}
    read = read_ahead(decode, chain(*chunks), ahead=2 * CHUNK + THREADS)
    # The device goes on while the chunk before is written.
    with contextlib.closing(read) as decoded, ThreadPoolExecutor(1) as writer:
        written = writer.submit(int)
        for chunk in together(tqdm(chunks, "Encoding", unit=" batches", disable=not (show and chunks))):
            usable = {}
            for picture in chunk:
                pixels, remarks = next(decoded)
                if remarks:  # before the features: where these are, nothing is left to be said
                    store.save_remarks(picture.key, remarks)
                if isinstance(pixels, BrokenPicture):
                    store.save_reason(picture.key, str(pixels))
                if isinstance(pixels, PictureError):
                    unusable[picture.key] = str(pixels)
                else:
                    usable[picture.key] = pixels
            features = vision_encoder(list(usable.values())).cpu() if usable else []
            written.result()  # raises what went wrong in it
            written = writer.submit(store.save_all, dict(zip(usable, features, strict=True)))
        written.result()
    return unusable


def decode_pictures(pictures, store, together, show):
    """Decodes each picture, to know that it can be: {key: reason} of those that can't, {key: remarks} of others."""

    def told(picture):
        try:
            return None, examine(picture, store.preprocess)[1]
        except PictureError as error:
            return str(error), []

    unusable, remarks = {}, {}
    with contextlib.closing(read_ahead(told, pictures, ahead=2 * THREADS)) as results:
        bar = tqdm(pictures, "Decoding", unit=" pictures", leave=False, disable=not (show and pictures))
        for picture in together(bar):
            reason, said = next(results)
            if reason is not None:
                unusable[picture.key] = reason
            if said:
                remarks[picture.key] = said
    return unusable, remarks


def keep_features(files, vision_encoder, store, accelerator, together):
    """Encodes the pictures that are not stored yet, shared out among the processes.

    Where they can't be stored, each is decoded instead, to know that it can be. Once all are stored the encoder has
    said all that it will be asked, and leaves a GPU's memory to the text model.

    Args:
        files: the {key: Picture} of each data file; a picture that stands in several is encoded with the first's.
        together: as of `encode_pictures`.
    Returns:
        {key: reason} of the pictures that can't be used, and {key: list of remarks} of those of which something is to
        be said, found now or by the run that stored them; both the same in all processes.
    """
    files, show = distinct(files), accelerator.is_main_process
    pictures = list(chain(*files))
    for folder, size in store.others() if show else ():
        print(f"{folder} ({size / 1e9:,.3f} GB) is of another model or version: delete it if nothing else needs it")
    missing = [picture for picture in pictures if picture.key not in store]
    unusable = {picture.key: reason for picture in missing if (reason := store.reason(picture.key))}
    has_room = store.has_room(len(missing) - len(unusable), show)
    unusable = dict(gather(list(unusable.items())))  # by now all have counted what is missing, and one may write

    def still_missing():
        return [picture for picture in missing if picture.key not in store and picture.key not in unusable]

    everyone = accelerator.process_index, accelerator.num_processes
    this_machine = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for i, processes in (everyone, this_machine):  # the second has work only where machines don't share the folder
        missing = still_missing()
        chunks = chunks_with(missing, files)[i::processes] if has_room else []
        found = encode_pictures(chunks, vision_encoder, store, together, show)
        unusable |= dict(gather(list(found.items())))

    missing = still_missing()
    i, processes = everyone
    found, remarks = decode_pictures(missing[i::processes], store, together, show)
    if not missing:
        vision_encoder.to("cpu")
    stored = {picture.key: said for picture in pictures if (said := store.remarks(picture.key))}
    return unusable | dict(gather(list(found.items()))), stored | dict(gather(list(remarks.items())))


def distinct(files):
    """Lists of the files' pictures, {key: Picture}, each without those of the files before it."""
    seen, lists = set(), []
    for pictures in files:
        lists.append([picture for key, picture in pictures.items() if key not in seen])
        seen |= pictures.keys()
    return lists


def chunks_with(missing, files):
    """Those chunks of the files' lists of pictures that hold a missing one; where a file ends, its last chunk does."""
    missing = set(missing)
    chunks = [pictures[start : start + CHUNK] for pictures in files for start in range(0, len(pictures), CHUNK)]
    return [chunk for chunk in chunks if not missing.isdisjoint(chunk)]
