"""Makes tests/tiny_moondream2/ and tests/tiny_moondream2_2025/: the classes of both releases in a few MiB each.

    python -m tests.make_tiny_checkpoint 2024-08-26
    python -m tests.make_tiny_checkpoint 2025-06-21

take about ten minutes each on two cores. First the vision encoder learns to see what `make_scenes.py` draws, then the
text model to talk about it. Neither the pictures nor the questions and answers are the sample data's: fine-tuning on
those has sight to build on, and their wording to learn.
"""

import argparse
import math
import random
import shutil
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils._pytree import tree_map
from transformers import CodeGenTokenizer

from moondream2.modeling_moondream2 import (
    HfMoondream,
    HfMoondreamConfig,
    Moondream,
    MoondreamConfig,
    PreTrainedTokenizerFast,
    lay_out_rows,
    preprocess,
    preprocess_tiled,
    prompt_text,
    row_mask,
)
from tests import make_scenes as street

FOLDERS = {"2024-08-26": "tiny_moondream2", "2025-06-21": "tiny_moondream2_2025"}
SEEDS = range(1_000_000, 1_003_000)
END = "<|endoftext|>"
TEXT = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 6, "rotary_dim": 16}
VISION = {"image_size": 126, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 4, "projection_size": 512}
PATCH = 14
SIDE = VISION["image_size"] // PATCH  # a picture is SIDE x SIDE places
MARGIN, MAX_TILES = 2, 4  # of the later release
KINDS = ("on", "beside", "waiting", "coming", "red", "green")  # of walkers, cars and signals that stand at a place
VALUES = {  # of each fact about a scene
    "crossing": (True, False),
    "signal": ("red", "green", None),
    "people": (0, 1, 2, 3, 4, None),  # None where there is no crossing to be on
    "walkers_beside": (0, 1, 2, 3),
    "car": ("waiting", "coming", None),
    "safe": ("plain", "red", "car", "green", "free"),
}
# For each fact a line of ways to ask about it, then lines of ways to answer, in the order of its values.
WORDINGS = """
Can you see stripes on the road?|Does this street have a crosswalk?|Is there a crosswalk?|Zebra or plain road?
Yes.|No.
There are zebra stripes.|There are no stripes.
Yes, I see a crosswalk.|No crosswalk.

Which colour is the light for walkers?|Is the pedestrian light red or green?|What does the lamp show?
Red.|Green.|None.
Stop.|Walk.|Nothing, I see no lamp.
It is red.|It is green.|There is none.

Count the people who walk over the road.|How many are crossing the road?|How many people are on the stripes?
0|1|2|3|4|No stripes
Zero.|One.|Two.|Three.|Four.|There is no crosswalk.
No people.|Only one.|A pair, two.|I count three.|I count four.|A plain road.

How many people are on the sidewalks?|Count those who walk beside the road.|How many are not on the road?
0|1|2|3
No people.|Only one.|A pair, two.|I count three.

What is the car doing?|Where is the car?|Has a car stopped here?|Tell me about cars.|Is a car near?
Waiting.|Coming.|None.
Yes, it has stopped.|No, it still drives.|No, there is none.
A car waits.|A car comes.|No car.

Can I walk over now? Say why.|Should I go or stay, and for what reason?|Is it safe to walk?|Go or wait, and why?
Stay, there are no stripes.|Stay, it is red.|Stay, a car comes.|Go, it is green.|Go, nothing comes.
No: no crosswalk.|No: red light.|No: a car.|Yes: green and the road is free.|Yes: the road is free.
Wait. A plain road.|Wait. The light is red.|Wait. The car drives.|Walk. Green, and no car.|Walk. No car.
"""
BLOCKS = [[line.split("|") for line in block.split("\n")] for block in WORDINGS.strip().split("\n\n")]


def facts(scene):
    """Of each fact, which of its values holds."""
    red, coming = scene.signal == "red", scene.car == "coming"
    safe = "plain" if not scene.crossing else "red" if red else "car" if coming else "green" if scene.signal else "free"
    held = vars(scene) | {"people": scene.walkers_on if scene.crossing else None, "safe": safe}
    return {fact: values.index(held[fact]) for fact, values in VALUES.items()}


def train_tokenizer(texts, special):
    """A byte-level BPE of these texts, as the releases'."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bytes_, size = pre_tokenizers.ByteLevel.alphabet(), TEXT["vocab_size"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=bytes_, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return bpe


def make_2024():
    """The tokenizer and an untrained model of 2024-08-26."""
    texts = [f"{prompt_text(text)} {text}" for block in BLOCKS for line in block for text in line]
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    bpe = train_tokenizer(texts, [END])
    tokenizer = CodeGenTokenizer(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **ends)
    return tokenizer, Moondream(MoondreamConfig(text_config=TEXT, vision_config=VISION, region_features=16))


def make_2025():
    """The tokenizer and an untrained model of 2025-06-21, its special tokens where the release has them."""
    texts = [text for block in BLOCKS for line in block for text in line]
    special = [AddedToken(token, special=True) for token in (END, *(f"<|md_reserved_{i}|>" for i in range(20)))]
    bpe = train_tokenizer([*texts, *["query", "describe", "short", "normal", "long"] * 3], special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)
    word = {text: bpe.encode(text).ids for text in ("query", "describe", "short", "normal", "long")}
    tokens = {"query": [1, *word["query"], 2]}
    tokens |= {
        f"{length} caption": [1, *word["describe"], 2, *word[length], 3] for length in ("short", "normal", "long")
    }
    region = {"coord_features": 16, "size_features": 16, "hidden_size": 32, "coord_bins": 16, "size_bins": 32}
    vision = VISION | {"overlap_margin": MARGIN, "max_tiles": MAX_TILES}
    config = HfMoondreamConfig(text_config=TEXT, vision_config=vision, tokens=tokens, region=region)
    return tokenizer, HfMoondream(config)


def pixels_2024(image, seed):
    """Half of the large ones are seen without tiles."""
    return preprocess(image, VISION["image_size"], 256 if seed % 2 else 512)


def pixels_2025(image, seed):
    return preprocess_tiled(image, VISION["image_size"], 2 * MARGIN * PATCH, MAX_TILES)


def picture(seed, pixels_of):
    """What `pixels_of` makes of it, the facts, and what stands at each place: 0 for nothing or one of KINDS, from 1.

    It is drawn at half its size, plenty for 126 pixels a side.
    """
    scene = street.make_scene(seed)
    canvas = street.Canvas(replace(scene, size=tuple(side // 2 for side in scene.size)))
    for draw in (street.draw_clouds, street.draw_ground, street.draw_houses):
        draw(canvas)
    places = torch.zeros(SIDE, SIDE, dtype=torch.long)
    for z, x, draw in street.place_things(canvas):
        draw(canvas, x, z)
        # Trees aside, what it is and how high its middle.
        kinds = {street.draw_car: (scene.car, 0.7), street.draw_signal: (scene.signal, 3.1)}
        kinds[street.draw_walker] = ("on" if abs(x) < canvas.kerb else "beside", 1.1)
        if draw in kinds:
            kind, y = kinds[draw]
            across, down = canvas.at(x, y, z)
            places[int(down / canvas.height * SIDE), int(across / canvas.width * SIDE)] = 1 + KINDS.index(kind)
    pixels = tree_map(torch.Tensor.numpy, pixels_of(street.finish(canvas), seed))
    return pixels, facts(scene), places.numpy()


@torch.no_grad()
def warm_start(patches, positions, pictures):
    """Has patches told by their principal components, whitened, and places by sines: seeing begins sooner."""
    width, whole = VISION["hidden_size"], (3, VISION["image_size"], VISION["image_size"])
    pixels = [pixels[0] if isinstance(pixels, tuple) else pixels for pixels, _, _ in pictures]
    pixels = torch.stack([each for each in pixels if each.shape == whole][:500])
    seen = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(seen.T.cov())
    weight = 0.2 * vectors[:, -width:] / (values[-width:] + 1e-3).sqrt()
    patches.weight.copy_(weight.T)
    patches.bias.copy_(-seen.mean(0) @ weight)
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    angles = (at[..., None] * (0.2 * 1.12 ** torch.arange(width // 4))).flatten(1)
    positions.copy_(0.2 * torch.cat([angles.sin(), angles.cos()], -1))


def train(loss_of, parameters, steps, name, rate=1e-3):
    """AdamW on `loss_of()`, a fresh batch each step: a short warm-up, then half a cosine down."""
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, 20 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"{name} {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)


def learn_to_see(encoder, pictures, steps, batch=24):
    """Trains the vision encoder by heads, thrown away after: what stands at each place, and the facts from the mean."""
    width, weights = TEXT["hidden_size"], torch.tensor([0.1] + [1.0] * len(KINDS))  # most places are empty
    heads = nn.ModuleDict({fact: nn.Linear(width, len(values)) for fact, values in VALUES.items()})
    heads["places"] = nn.Linear(width, len(weights))

    def loss_of():
        chosen = []
        for i in torch.randint(len(pictures), (batch,)):
            pixels, known, places = pictures[i]
            mirror, light = [-1] if torch.rand(()) < 0.5 else [], torch.empty(3, 1, 1).uniform_(0.85, 1.15)
            pixels = tree_map(lambda x, light=light, mirror=mirror: light * x.flip(mirror), pixels)
            chosen.append((pixels, known, places.flip(mirror)))
        pixels, known, places = zip(*chosen, strict=True)
        seen = encoder(pixels)
        loss = F.cross_entropy(heads["places"](seen).flatten(0, 1), torch.stack(places).flatten(), weights)
        for fact in VALUES:
            loss = loss + F.cross_entropy(heads[fact](seen.mean(1)), torch.tensor([each[fact] for each in known]))
        return loss

    train(loss_of, [*encoder.parameters(), *heads.parameters()], steps, "seeing")


def learn_to_talk(model, tokenizer, pictures, steps, batch=12):
    """Trains the text model on the facts as the vision encoder sees them: a question each, in wordings drawn anew."""
    rng, config, end = random.Random("talk"), model.config, tokenizer.eos_token_id
    pixels = [each for each, _, _ in pictures]
    seen = torch.cat([model.encode_image(pixels[i : i + 24]) for i in range(0, len(pixels), 24)])

    def loss_of():
        chosen = torch.randint(len(pictures), (batch,)).tolist()
        rows, labels = [], []
        for i in chosen:
            row, label = [], [-100] * config.prefix_tokens
            for (asking, *answering), value in zip(BLOCKS, pictures[i][1].values(), strict=True):
                (prompt,) = config.prompt_ids([rng.choice(asking)], tokenizer)
                (answer,) = config.answer_ids([rng.choice(answering)[value]], tokenizer)
                row.append((prompt, answer))
                label += [-100] * len(prompt) + answer
            rows.append(row)
            labels.append(torch.tensor(label))
        layout = lay_out_rows(rows, end, config.image_tokens)
        inputs = {name: layout[name] for name in ("input_ids", "position_ids")}
        mask, labels = (
            row_mask(layout["document_ids"], config.prefix_tokens),
            nn.utils.rnn.pad_sequence(labels, True, -100),
        )
        return model(**inputs, image_embeds=seen[chosen], attention_mask=mask, labels=labels).loss

    train(loss_of, list(model.text_model.parameters()), steps, "talking")


def save(model, tokenizer, dtype, folder):
    """Writes the folder as the hub's, but without the model's code, which the project root has already."""
    type(model)._auto_class = type(model.config)._auto_class = None  # or save_pretrained would copy it
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", choices=FOLDERS)
    release = parser.parse_args().release
    torch.set_num_threads(2)
    torch.manual_seed(0)
    is_first = release == "2024-08-26"
    with Pool() as pool:
        drawn = pool.map(partial(picture, pixels_of=pixels_2024 if is_first else pixels_2025), SEEDS, chunksize=50)
    pictures = [tree_map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, each) for each in drawn]
    tokenizer, model = make_2024() if is_first else make_2025()
    encoder = model.vision_encoder
    if is_first:
        visual = encoder.encoder.model.visual
        warm_start(visual.patch_embed.linear, visual.pos_embed, pictures)
    else:
        warm_start(encoder.patch_emb, encoder.pos_emb, pictures)
    learn_to_see(encoder, pictures, steps=1200)
    learn_to_talk(model, tokenizer, pictures, steps=600)
    # Each in the type of its release's weights.
    save(model, tokenizer, torch.float16 if is_first else torch.bfloat16, Path(__file__).parent / FOLDERS[release])


if __name__ == "__main__":
    main()
