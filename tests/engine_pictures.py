"""What Moondream's own engine makes of pictures by its own decoder and Lanczos, against Pillow's.

python -m tests.engine_pictures [MODEL]

Says how many of 255 levels they are apart on average, as the model sees them and as the release would, of the sample's
validation pictures and of the same four times as large; how far the model's features are apart, and how many questions
get the same answer. It takes kestrel's own code and no card: pip install --no-deps -r tests/requirements-kestrel.txt
"""

import argparse
import io
import json
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from moondream2 import cli
from moondream2 import modeling_moondream2 as modeling
from moondream2.cli import InputError
from tests.shared import ROOT, TINY_2025

try:
    import kestrel_native
except ImportError:  # the quick tests do without
    kestrel_native = None

pillows_pixels = modeling.to_pixels


def engines_pixels(image, width, height, resampling):
    """As `to_pixels`, resized by the engine."""
    resized = Image.fromarray(kestrel_native.resize_lanczos3(np.array(image), height, width))
    return pillows_pixels(resized, width, height, resampling)


def decoded(data):
    return Image.fromarray(kestrel_native.decode_image(data))


def jpeg_again(data):
    """What the client sends of a PIL image."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(file, "JPEG", quality=95)
    return decoded(file.getvalue())


WAYS = {
    "its Lanczos": lambda data: Image.open(io.BytesIO(data)),
    "its decoder and Lanczos, given a file's bytes": decoded,
    "these, given a PIL image": jpeg_again,
}


def away(pixels, others):
    """How many levels of 255 two Pixels are apart on average."""
    return np.mean([(a - b).abs().mean().item() * 127.5 for a, b in zip(pixels, others, strict=True)])


@torch.no_grad()
def seen(model, tokenizer, pictures, read, to_pixels):
    """For each picture three Pixels, its features, and the answers to its questions."""
    for path, questions in pictures.items():
        with patch.object(modeling, "to_pixels", to_pixels):
            image = read((ROOT / path).read_bytes())
            larger = image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)
            views = [model.vision_encoder.preprocess(image), *map(modeling.preprocess_tiled, (image, larger))]
        embeds = model.encode_image(views[:1])
        yield views, embeds, model.answer_questions(embeds, [questions], tokenizer)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=TINY_2025, help="a saved model of 2025-06-21; default: the tests'")
    folder = parser.parse_args().model
    if kestrel_native is None:
        raise InputError("this takes kestrel's own code: pip install --no-deps -r tests/requirements-kestrel.txt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = {}
    for line in (ROOT / "valid.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(line)
        pictures.setdefault(line["image_path"], []).append(line["question"])
    ours = list(seen(model, tokenizer, pictures, WAYS["its Lanczos"], pillows_pixels))
    print(f"{'':46}levels  of the release  of large ones  features  the same answers")
    for name, read in WAYS.items():
        rows = []
        for own, its in zip(ours, seen(model, tokenizer, pictures, read, engines_pixels), strict=True):
            apart = map(away, own[0], its[0])
            of_features = ((own[1] - its[1]).norm() / own[1].norm()).item()
            same = np.mean([a == b for a, b in zip(own[2], its[2], strict=True)])
            rows.append((*apart, of_features, same))
        small, release, large, features, same = np.mean(rows, axis=0)
        print(f"{name:46}{small:6.2f}  {release:14.2f}  {large:13.2f}  {features:8.1%}  {same:16.1%}")


if __name__ == "__main__":
    cli.run(main)
