"""The store of picture features: what the frozen vision encoder says of a picture, computed once and kept on disk.

A picture's features lie in a file of their own, named by the picture's content, in a folder named by the encoder's
weights. So the next run starts at once, a changed picture or model is encoded anew, and runs may share the folder.
"""

import contextlib
import hashlib
import os
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from moondream2.checkpoints import leave_signals
from moondream2.cli import InputError
from moondream2.files import write_whole
from moondream2.pictures import PictureError, pixels_of

LONGEST_WRITE = 24 * 60 * 60  # seconds
# Pictures that go through the encoder together: always the same ones, though some be stored already, so that a resumed
# pass computes the same bits.
CHUNK = 8


class FeatureStore:
    """Features by picture key, (729, 2048) each, memory-mapped when read; `folder` None keeps nothing.

    A store that `is_full` takes nothing more. An entry carries a checksum; one that is damaged, of another shape or
    half-written counts as missing.
    """

    def __init__(self, folder, vision_encoder, shape):
        self.shape = tuple(shape)
        self.dtype = vision_encoder.projection["mlp"].fc1.weight.dtype
        self.entry_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self.key = weights_key(vision_encoder.state_dict())
        self.folder = None if folder is None else Path(folder) / self.key
        self.is_full = folder is None

    def path(self, key):
        return self.folder / key[:2] / f"{key}.safetensors"

    @property
    def encoder(self):
        return self.folder / "encoder.safetensors"

    def __contains__(self, key):
        """Whether an entry of the right size is there; only `load` reads it."""
        with contextlib.suppress(OSError):
            return self.folder is not None and self.path(key).stat().st_size > self.entry_bytes
        return False

    def load(self, key):
        """The features of a picture, or None where there are none or they are damaged."""
        if key not in self:
            return None
        try:
            with safe_open(self.path(key), framework="pt") as file:
                features, checksum = file.get_tensor("features"), file.metadata()["crc32"]
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        is_whole = features.shape == self.shape and features.dtype == self.dtype and crc32(features) == checksum
        return features if is_whole else None

    def save_all(self, features):
        """Stores the features {key: tensor} that are not stored yet."""
        for key, each in features.items():
            if key not in self:
                self.save(key, each)

    def save(self, key, features):
        if not self.is_full:
            features = features.cpu().contiguous()
            self.path(key).parent.mkdir(parents=True, exist_ok=True)
            with write_whole(self.path(key)) as path:
                save_file({"features": features}, path, metadata={"crc32": crc32(features)})

    def tidy(self):
        """Removes what runs that were killed while they wrote have left here; a run that still writes is quicker."""
        for part in self.folder.rglob(".*.part"):
            with contextlib.suppress(OSError):  # another run's
                if time.time() - part.stat().st_mtime > LONGEST_WRITE:
                    part.unlink()

    def has_encoder(self):
        """Whether the encoder's weights lie whole beside its features."""
        with contextlib.suppress(OSError, SafetensorError):
            return weights_key(load_file(self.encoder)) == self.key
        return False

    def keep_encoder(self, vision_encoder):
        with write_whole(self.encoder) as path:
            save_file(vision_encoder.state_dict(), path)

    def set_aside(self, vision_encoder):
        """Maps the encoder's weights from that file: they take no memory, on no device, until they are asked for."""
        vision_encoder.load_state_dict(load_file(self.encoder), assign=True)


def crc32(tensor):
    return str(zlib.crc32(tensor.view(torch.uint8).numpy()))


def weights_key(weights):
    """A name for a state dict: its names, their types and shapes, and what is in them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Decoded(torch.utils.data.Dataset):
    """Chunks of pictures, decoded by the loader's workers: lists of (picture, pixels or PictureError)."""

    def __init__(self, chunks, encoder):
        self.chunks, self.image_size, self.tile_from = chunks, encoder.image_size, encoder.tile_from

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, i):
        return [(picture, self.decode(picture)) for picture in self.chunks[i]]

    def decode(self, picture):
        try:
            return pixels_of(picture, self)
        except PictureError as error:
            return error


@torch.no_grad()
def encode_pictures(pictures, vision_encoder, store, workers=0, share=(0, 1), check_stop=lambda: None, show=True):
    """Encodes and stores the pictures that are not stored yet; returns whether the store is there to be used.

    Args:
        pictures: list of Picture, distinct by key.
        share: (this process, processes): which of the chunks this process sees to.
        check_stop: called between chunks; raises to end the pass, which a later run goes on with.
    """
    if store.folder is None:
        return False
    store.tidy()
    missing = sum(picture.key not in store for picture in pictures)
    if not missing:
        return True
    chunks = [pictures[i : i + CHUNK] for i in range(0, len(pictures), CHUNK)][share[0] :: share[1]]
    chunks = [chunk for chunk in chunks if any(picture.key not in store for picture in chunk)]
    store.folder.mkdir(parents=True, exist_ok=True)
    weights = 0 if store.encoder.exists() else sum(p.nbytes for p in vision_encoder.parameters())
    need, free = missing * store.entry_bytes, shutil.disk_usage(store.folder).free
    if show:
        gb = (need + weights) / 1e9
        print(f"Encoding {missing:,} pictures into {store.folder} ({gb:,.3f} GB, {free / 1e9:,.1f} free)")
    if need > free:
        if show:
            print("That does not fit: each of them will be encoded whenever it is needed instead.")
        return False
    is_cuda = next(vision_encoder.parameters()).is_cuda
    options = {"num_workers": workers, "pin_memory": is_cuda, "worker_init_fn": leave_signals}
    loader = DataLoader(Decoded(chunks, vision_encoder), None, **options)
    with ThreadPoolExecutor(1) as writer:  # the device goes on while the chunk before is written
        written = writer.submit(int)
        for chunk in tqdm(loader, "Encoding", unit=" batches", disable=not show):
            check_stop()
            usable = {picture.key: pixels for picture, pixels in chunk if torch.is_tensor(pixels)}
            features = vision_encoder(list(usable.values())).cpu() if usable else []
            written.result()  # raises what went wrong in it
            written = writer.submit(store.save_all, dict(zip(usable, features, strict=True)))
        written.result()
    return True


def keep_features(pictures, vision_encoder, store, accelerator, workers, check_stop):
    """Encodes all pictures, shared out among the processes; where they can't be stored each is encoded when needed.

    Once they are stored the encoder has said all that it will be asked, and leaves memory to the text model.
    """
    workers = workers if accelerator.device.type == "cuda" else 0
    everyone = accelerator.process_index, accelerator.num_processes
    this_machine = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for share in (everyone, this_machine):  # the second finds nothing to do, unless machines don't share the folder
        show = accelerator.is_main_process and share is everyone
        is_kept = encode_pictures(pictures, vision_encoder, store, workers, share, check_stop, show)
        accelerator.wait_for_everyone()
    if is_kept and accelerator.is_local_main_process and not store.has_encoder():
        try:
            store.keep_encoder(vision_encoder)
        except InputError as error:
            print(f"{error}: the vision encoder stays in memory")
    accelerator.wait_for_everyone()
    if not is_kept:
        store.is_full = True
    elif store.has_encoder():
        store.set_aside(vision_encoder)
