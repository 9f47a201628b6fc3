"""Makes tests/tiny_moondream2/: Moondream2's classes in a few MiB, for the tests and the first command.

    python -m tests.make_tiny_checkpoint

takes about seven minutes on two cores. First the vision encoder learns to see what `make_scenes.py` draws, then the
text model to talk about it. Neither the pictures nor the questions and answers are the sample data's: fine-tuning on
those has sight to build on, and their wording to learn.
"""

import math
import random
import shutil
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CodeGenTokenizer

from moondream2.modeling_moondream2 import (
    Moondream,
    MoondreamConfig,
    answer_text,
    lay_out_rows,
    preprocess,
    prompt_text,
    row_mask,
)
from tests import make_scenes as street

FOLDER = Path(__file__).parent / "tiny_moondream2"
SEEDS = range(1_000_000, 1_003_000)
END = "<|endoftext|>"
TEXT = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 6, "rotary_dim": 16}
VISION = {"image_size": 126, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 4, "projection_size": 512}
PATCH = 14
SIDE = VISION["image_size"] // PATCH  # a picture is SIDE x SIDE places
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


def make_tokenizer():
    """A byte-level BPE, as the release's, of the words in WORDINGS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bytes_, size = pre_tokenizers.ByteLevel.alphabet(), TEXT["vocab_size"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=bytes_, show_progress=False)
    texts = [f"{prompt_text(text)} {text}" for block in BLOCKS for line in block for text in line]
    bpe.train_from_iterator(texts, trainer)
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    return CodeGenTokenizer(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **ends)


def picture(seed):
    """Pixels (3, height, width), the facts, and what stands at each place: 0 for nothing or one of KINDS, from 1.

    It is drawn at half its size, plenty for 126 pixels a side; half of the large ones are seen without tiles.
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
    pixels = preprocess(street.finish(canvas), VISION["image_size"], 256 if seed % 2 else 512)
    return pixels.numpy(), facts(scene), places.numpy()


@torch.no_grad()
def warm_start(visual, pictures):
    """Has patches told by their principal components, whitened, and places by sines: seeing begins sooner."""
    width, whole = VISION["hidden_size"], (3, VISION["image_size"], VISION["image_size"])
    pixels = torch.stack([pixels for pixels, _, _ in pictures if pixels.shape == whole][:500])
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T.cov())
    weight = 0.2 * vectors[:, -width:] / (values[-width:] + 1e-3).sqrt()
    visual.patch_embed.linear.weight.copy_(weight.T)
    visual.patch_embed.linear.bias.copy_(-patches.mean(0) @ weight)
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    angles = (at[..., None] * (0.2 * 1.12 ** torch.arange(width // 4))).flatten(1)
    visual.pos_embed.copy_(0.2 * torch.cat([angles.sin(), angles.cos()], -1))


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
            chosen.append((light * pixels.flip(mirror), known, places.flip(mirror)))
        pixels, known, places = zip(*chosen, strict=True)
        seen = encoder(pixels)
        loss = F.cross_entropy(heads["places"](seen).flatten(0, 1), torch.stack(places).flatten(), weights)
        for fact in VALUES:
            loss = loss + F.cross_entropy(heads[fact](seen.mean(1)), torch.tensor([each[fact] for each in known]))
        return loss

    train(loss_of, [*encoder.parameters(), *heads.parameters()], steps, "seeing")


def learn_to_talk(model, tokenizer, pictures, steps, batch=12):
    """Trains the text model on the facts as the vision encoder sees them: a question each, in wordings drawn anew."""
    rng, end, tokens = random.Random("talk"), tokenizer.eos_token_id, model.config.image_tokens
    pixels = [each for each, _, _ in pictures]
    seen = torch.cat([model.encode_image(pixels[i : i + 24]) for i in range(0, len(pixels), 24)])

    def loss_of():
        chosen = torch.randint(len(pictures), (batch,)).tolist()
        rows, labels = [], []
        for i in chosen:
            row, label = [], [-100] * (1 + tokens)
            for (asking, *answering), value in zip(BLOCKS, pictures[i][1].values(), strict=True):
                prompt = tokenizer(prompt_text(rng.choice(asking))).input_ids
                answer = tokenizer(answer_text(rng.choice(answering)[value])).input_ids + [end]
                row.append((prompt, answer))
                label += [-100] * len(prompt) + answer
            rows.append(row)
            labels.append(torch.tensor(label))
        layout = lay_out_rows(rows, end, tokens)
        inputs = {name: layout[name] for name in ("input_ids", "position_ids")}
        mask, labels = row_mask(layout["document_ids"], 1 + tokens), nn.utils.rnn.pad_sequence(labels, True, -100)
        return model(**inputs, image_embeds=seen[chosen], attention_mask=mask, labels=labels).loss

    train(loss_of, list(model.text_model.parameters()), steps, "talking")


def save(model, tokenizer):
    """Writes the folder as the hub's, in float16, but without the model's code, which the project root has already."""
    Moondream._auto_class = MoondreamConfig._auto_class = None  # or save_pretrained would copy it
    shutil.rmtree(FOLDER, ignore_errors=True)
    model.half().save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)


def main():
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with Pool() as pool:
        drawn = pool.map(picture, SEEDS, chunksize=50)
    pictures = [(torch.from_numpy(pixels), known, torch.from_numpy(places)) for pixels, known, places in drawn]
    tokenizer = make_tokenizer()
    model = Moondream(MoondreamConfig(text_config=TEXT, vision_config=VISION, region_features=16))
    warm_start(model.vision_encoder.encoder.model.visual, pictures)
    learn_to_see(model.vision_encoder, pictures, steps=1200)
    learn_to_talk(model, tokenizer, pictures, steps=600)
    save(model, tokenizer)


if __name__ == "__main__":
    main()
