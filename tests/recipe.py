"""Weights and pictures by a formula, so that golden figures can be computed anywhere without the released weights."""

import zlib

import numpy as np
import torch
from PIL import Image

from moondream2.modeling_moondream2 import MoondreamConfig, TextModel, VisionEncoder

BLOCK = 1 << 14  # values that are made at once: they stay in the cache, so it takes an eighth of the time


def fill(name, shape, scale=0.02, offset=0.0):
    """float32 values of standard deviation `scale` around `offset`, told by the parameter's name alone."""
    values = np.empty(int(np.prod(shape)), np.float32)
    numbers, x, y, u = np.arange(BLOCK, dtype=np.uint64), *np.empty((2, BLOCK), np.uint64), np.empty(BLOCK)
    width = np.sqrt(3) * scale  # of the uniform distribution on each side
    with np.errstate(over="ignore"):
        first = np.uint64(zlib.crc32(name.encode())) * np.uint64(0x9E3779B97F4A7C15)
        for start in range(0, len(values), BLOCK):
            np.add(numbers, first + np.uint64(start), out=x)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                x ^= np.right_shift(x, np.uint64(shift), out=y)
                x *= np.uint64(factor)
            x ^= np.right_shift(x, np.uint64(31), out=y)
            x >>= np.uint64(11)
            np.multiply(x, 2.0**-52 * width, out=u)
            u += offset - width
            values[start : start + BLOCK] = u[: len(values) - start]
    return torch.from_numpy(values).view(shape)


@torch.no_grad()
def fill_module(module, prefix, scale=0.02):
    """Fills every parameter of a module whose state-dict names begin with `prefix` in the full model."""
    for name, parameter in module.named_parameters(prefix):
        *_, owner, kind = name.split(".")
        is_norm_weight = kind == "weight" and owner in ("norm", "norm1", "norm2", "ln", "ln1", "ln2", "post_ln")
        parameter.copy_(fill(name, parameter.shape, *((0.05, 1.0) if is_norm_weight else (scale,))))
    return module


def golden_encoder():
    """The vision encoder of 2024-08-26, filled."""
    with torch.device("meta"):
        encoder = VisionEncoder(MoondreamConfig())
    return fill_module(encoder.to_empty(device="cpu"), "vision_encoder").eval()


def golden_text_model():
    """A text model of two layers of that release, filled."""
    with torch.device("meta"):
        model = TextModel(MoondreamConfig(text_config={"num_hidden_layers": 2}).text_config)
    return fill_module(model.to_empty(device="cpu"), "text_model").eval()


def picture(width, height):
    """Red grows to the right, green downwards, blue is a chequerboard of 8 pixels a field; one pixel has its own."""
    if width == height == 1:
        return Image.new("RGB", (1, 1), (10, 20, 30))
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    blue = ((x // 8 + y // 8) % 2) * 255
    return Image.fromarray(np.stack([x * 255 // (width - 1), y * 255 // (height - 1), blue], -1).astype(np.uint8))
