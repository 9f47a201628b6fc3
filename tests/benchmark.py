"""The plain way against this project's way, on the same pictures and questions, in one process and in turns.

`python -m tests.benchmark` builds Moondream2 at full size with random weights in bfloat16. The plain way is the
original's loop: for each batch encode each example's picture, embed, all logits, cross-entropy with -100, AdamW.
Times are of an epoch and its validation (a question in four is for validation), with this project's one-time encoding
of the pictures spread over EPOCHS = 5. It is an hour's work on two cores; `--layers 4 --vision_layers 4` or `--tiny`
make it minutes. `--release 2025-06-21` measures that one. `--lora_rank 16` measures a run with adapters against this
project's run without, two pictures a step.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finetune_moondream as script
from moondream2 import adapters
from moondream2.data import Example, Line, tokenize
from moondream2.evaluation import evaluate
from moondream2.features import CHUNK, FeatureStore, encode_pictures, image_embeds
from moondream2.modeling_moondream2 import HfMoondream, Moondream
from moondream2.pace import operations
from moondream2.pictures import look, pixels_of
from moondream2.rows import lay_out, rows_of
from tests.shared import ROOT, TINY, TINY_2025, constants, engine_of, step_of, write_lines

SMALL = {"2024-08-26": TINY, "2025-06-21": TINY_2025}
VALID_SHARE = 0.25  # validation questions for each training question
# As the sample data's, some of which are seen in tiles: 1, 3, 1, 5, 1, 3, 1 and 1 passes of the vision transformer.
SIZES = ((640, 480), (512, 768), (320, 240), (800, 600), (360, 480), (512, 768), (400, 300), (480, 360))
QUESTIONS = ("What does the pedestrian signal show?", "How many people are on the crossing?", "Is a car waiting?")
ANSWERS = ("The signal is red.", "Two people.", "No, a car is still coming.")


def build(arguments):
    """The model in bfloat16, weights random but for the small checkpoint."""
    if arguments.tiny:
        model = AutoModelForCausalLM.from_pretrained(SMALL[arguments.release], dtype=torch.bfloat16)
    else:
        text, vision = {"num_hidden_layers": arguments.layers}, {"num_hidden_layers": arguments.vision_layers}
        with torch.device("meta"):
            model_class = HfMoondream if arguments.release == "2025-06-21" else Moondream
            model = model_class(model_class.config_class(text_config=text, vision_config=vision)).to(torch.bfloat16)
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                is_norm = re.search(r"\.(ln\d?|post_ln|norm\d?)\.weight$", name)
                tensor.normal_(1.0 if is_norm else 0.0, 0.02, generator=generator)
    model.vision_encoder.requires_grad_(False)
    return model


class Examples(list):
    """`count` questions on pictures of their own, `questions` on each, tokenized."""

    def __init__(self, folder, config, tokenizer, count, questions):
        self.pictures = {}
        lines, keys = [], []
        for i in range(count):
            number, k = i // questions, i % questions % 3
            path = folder / f"{number}.png"
            if not path.exists():
                Image.effect_noise(SIZES[number % len(SIZES)], 40 + number).convert("RGB").save(path)
            picture = look(path)
            self.pictures[picture.key] = picture
            keys.append(picture.key)
            lines.append(Line(f"{i}", path.name, QUESTIONS[k], (ANSWERS[k],)))
        for line, key, ids in zip(lines, keys, tokenize(lines, config, tokenizer), strict=True):
            self.append(Example(*line, key, *ids))


class Plain:
    """The original's loop."""

    def __init__(self, model, tokenizer, learning_rate):
        self.model, self.bos, self.learning_rate = model, tokenizer.bos_token_id, learning_rate

    def start(self):
        self.optimizer = torch.optim.AdamW(self.model.text_model.parameters(), lr=self.learning_rate)
        self.optimizer.step()  # with the gradients of the turn before: makes its state, which is not to be timed
        self.optimizer.zero_grad()

    def stop(self):
        self.optimizer = None

    def loss(self, examples):
        model, encoder = self.model, self.model.vision_encoder
        with torch.no_grad():
            images = [pixels_of(examples.pictures[example.picture], encoder.preprocess) for example in examples]
            image_embeds = encoder(images)
        texts = [torch.tensor([self.bos, *example.prompt_ids, *example.answer_ids]) for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.bos)
        embeds = model.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:, :1], image_embeds, embeds[:, 1:]], dim=1)
        labels = torch.full(embeds.shape[:2], -100)
        mask = torch.zeros(embeds.shape[:2], dtype=torch.long)
        for r, example in enumerate(examples):
            start = 1 + image_embeds.shape[1] + len(example.prompt_ids)
            labels[r, start : start + len(example.answer_ids)] = torch.tensor(example.answer_ids)
            mask[r, : start + len(example.answer_ids)] = 1
        prefix = model.config.prefix_tokens
        logits = model.text_model(inputs_embeds=embeds, attention_mask=mask, prefix_tokens=prefix).logits.float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def train(self, examples):
        loss = self.loss(examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.text_model.parameters(), script.MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def validate(self, examples):
        return self.loss(examples).item()


class Ours:
    """The script's own functions."""

    def __init__(self, model, tokenizer, examples, folder):
        self.model, self.tokenizer, self.engine = model, tokenizer, None
        self.store = FeatureStore(folder, model)
        tokens = {"bos": tokenizer.bos_token_id, "image_tokens": model.config.image_tokens}
        self.lay_out = partial(lay_out, pictures=examples.pictures, store=self.store, **tokens)

    def start(self):
        self.engine = engine_of(self.model)
        self.engine.optimizer.step()
        self.engine.optimizer.zero_grad()

    def stop(self):
        self.engine = None

    def encode(self, examples):
        pictures = list(examples.pictures.values())
        encode_pictures(
            [pictures[i : i + CHUNK] for i in range(0, len(pictures), CHUNK)],
            self.model.vision_encoder,
            self.store,
            show=False,
        )

    def collate(self, examples):
        return script.collate(rows_of(examples, 2**20), self.lay_out)

    def train(self, examples):
        self.model.train()
        batches = [self.collate(examples)]
        return step_of(self.engine, batches, self.model.vision_encoder, script.MAX_GRAD_NORM).loss

    def validate(self, examples):
        return evaluate(self.model, self.tokenizer, [self.collate(examples)])[0]

    def forward_backward(self, examples, clock=time.perf_counter):
        batch = self.collate(examples)
        embeds = image_embeds(batch["pictures"], self.model.vision_encoder, "cpu")
        loss = partial(script.answer_loss, self.model.text_model, batch, embeds, "cpu")
        seconds, _ = timed(lambda: loss().backward(), clock)
        self.model.zero_grad()
        return seconds, operations(self.model.config.text_config, batch)


class Adapted(Ours):
    """The same with adapters of that rank, as LORA_RANK has them."""

    def __init__(self, rank, *arguments):
        super().__init__(*arguments)
        self.rank = rank

    def start(self):
        adapters.add(self.model, constants(lora_rank=self.rank))
        super().start()

    def stop(self):
        adapters.merge(self.model, *self.engine[:2])
        super().stop()
        self.model.text_model.requires_grad_(True)


def timed(function, clock=time.perf_counter):
    started = clock()
    result = function()
    return clock() - started, result


def matmul_rate(width, inner):
    """Operations a second of a large product in bfloat16, of the shapes that the text model has."""
    a, b = torch.randn(1600, width).bfloat16(), torch.randn(width, inner).bfloat16()
    best = min(timed(lambda: a @ b)[0] for _ in range(12))
    return 2 * 1600 * width * inner / best


def compare(arguments, model, tokenizer, questions):
    """Seconds a question of both sides, round by round, for so many questions a picture, and the rates reached."""
    pictures = arguments.pictures or max(1, arguments.batch_size // questions)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        examples = Examples(folder, model.config, tokenizer, pictures * questions, questions)
        batches = [examples[i : i + arguments.batch_size] for i in range(0, len(examples), arguments.batch_size)]
        batches = [Batch(batch, examples.pictures) for batch in batches]
        sides = {
            "plain": Plain(model, tokenizer, script.LEARNING_RATE),
            "ours": Ours(model, tokenizer, examples, folder / "features"),
        }
        encoding, _ = timed(lambda: sides["ours"].encode(examples))
        encoding *= (1 + VALID_SHARE) / script.EPOCHS  # the validation pictures' too; once for all epochs
        first = {name: side.validate(batches[0]) for name, side in sides.items()}
        print(f"{questions} a picture, losses: {first}", file=sys.stderr, flush=True)
        assert abs(first["plain"] - first["ours"]) < 0.01 * first["plain"], first  # a bfloat16 is within 0.4%
        seconds = {"plain": [], "ours": []}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                for parameter in model.text_model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                side.start()
                training, _ = timed(lambda side=side: [side.train(batch) for batch in batches])
                side.stop()
                validating, _ = timed(lambda side=side: [side.validate(batch) for batch in batches])
                gc.collect()  # what a turn no longer needs, the other may: 24 GiB are just enough
                if sys.platform == "linux":
                    ctypes.CDLL(None).malloc_trim(0)
                total = training + VALID_SHARE * validating + (encoding if name == "ours" else 0)
                seconds[name].append(total / len(examples))
                print(
                    f"{questions} a picture, {name}: {seconds[name][-1]:.3f} s a question", file=sys.stderr, flush=True
                )
        # The best of some passes, as of the product: the first has memory to ask for that a step before it would leave.
        spent, operations = min(sides["ours"].forward_backward(batches[0]) for _ in range(3))
        text = model.config.text_config
        rates = operations / spent, matmul_rate(text.hidden_size, text.intermediate_size)
        tokens = sum(len(e.prompt_ids) + len(e.answer_ids) + 1 + model.config.image_tokens for e in examples)
        return seconds, tokens / len(examples), rates


class Batch(list):
    def __init__(self, examples, pictures):
        super().__init__(examples)
        self.pictures = pictures


def compare_with_adapters(arguments, model, tokenizer, questions):
    """Seconds of a forward and backward pass and of a whole step, round by round, all weights against adapters.

    They are processor time, of all cores: what other programs do meanwhile changes them little.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        examples = Examples(folder, model.config, tokenizer, 2 * questions, questions)
        common = model, tokenizer, examples, folder / "features"
        sides = {"all": Ours(*common), "adapters": Adapted(arguments.lora_rank, *common)}
        sides["all"].encode(examples)
        passes, steps = ({name: [] for name in sides} for _ in range(2))
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                side.start()
                passes[name].append(side.forward_backward(examples, time.process_time)[0])
                steps[name].append(timed(lambda side=side: side.train(examples), time.process_time)[0])
                side.stop()
                said = f"{passes[name][-1]:.2f} s forward and backward, {steps[name][-1]:.2f} s a step"
                print(f"{questions} a picture, {name}: {said}", file=sys.stderr, flush=True)
    return passes, steps


def measure_adapters(arguments):
    """Prints a table of the times of adapters against those of all weights."""
    model, tokenizer = build(arguments), AutoTokenizer.from_pretrained(SMALL[arguments.release])
    print("| questions a picture | pass, all weights | adapters | ratio | step, all weights | adapters | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for questions in arguments.questions_per_picture:
        cells = [str(questions)]
        for seconds in compare_with_adapters(arguments, model, tokenizer, questions):
            full, adapted = (statistics.median(seconds[name]) for name in ("all", "adapters"))
            ratios = sorted(a / b for a, b in zip(seconds["adapters"], seconds["all"], strict=True))
            cells += [f"{full:.1f} s", f"{adapted:.1f} s", f"{statistics.median(ratios):.2f}"]
        print("|", " | ".join(cells), "|", flush=True)


def peak(arguments, side):
    """Peak memory in GiB of one side's training at the defaults, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmark", "--side", side, "--layers", str(arguments.layers)]
    command += ["--vision_layers", str(arguments.vision_layers), "--batch_size", str(arguments.memory_batch_size)]
    command += ["--release", arguments.release, *(["--tiny"] if arguments.tiny else [])]
    command += ["--gradient_checkpointing"] if arguments.gradient_checkpointing else []
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(arguments):
    """Two steps of one side, one question a picture, then what the process had at most."""
    model, tokenizer = build(arguments), AutoTokenizer.from_pretrained(SMALL[arguments.release])
    with tempfile.TemporaryDirectory() as folder:
        examples = Examples(Path(folder), model.config, tokenizer, arguments.batch_size, 1)
        if arguments.side == "plain":
            side = Plain(model, tokenizer, script.LEARNING_RATE)
        else:
            common = model, tokenizer, examples, Path(folder) / "features"
            side = Adapted(arguments.lora_rank, *common) if arguments.lora_rank else Ours(*common)
            side.encode(examples)
            if arguments.gradient_checkpointing:
                model.activation_checkpointing_enable()
        side.start()
        for _ in range(2):
            side.train(examples)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


LOADING = """
import sys, threading, time
from finetune_moondream import load_model

def own_gib():  # without the pages of the mapped file, which the system may drop at any time
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 2**20

def watch():
    while True:
        seen.append(own_gib())
        time.sleep(0.01)

seen, before = [], own_gib()
threading.Thread(target=watch, daemon=True).start()
model = load_model(sys.argv[1], "main")
weights = sum(p.nbytes for p in model.parameters()) / 2**30
print(f"GiB of weights: {weights:.2f}, at most in use while they load: {max(seen) - before:.2f}")
"""


def loading(arguments):
    """Prints the peak memory of loading a float16 checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        build(arguments).half().save_pretrained(folder)
        environment = {**os.environ, "PYTHONPATH": str(Path(script.__file__).parent)}
        subprocess.run([sys.executable, "-c", LOADING, folder], env=environment, check=True)


def growth(count):
    """Seconds of a training epoch over `count` lines, of all the rest of the run, and its peak memory in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        folder, tokenizer, config = Path(folder), AutoTokenizer.from_pretrained(TINY), AutoConfig.from_pretrained(TINY)
        flags = {"model_id": TINY, "epochs": 1, "batch_size": 8, "valid_answers": 0, "output_dir": folder / "out"}
        flags |= {"features_dir": folder / "features"}
        for split, lines in (("train", count), ("valid", 60)):
            examples = Examples(folder, config, tokenizer, lines, 4)
            lines = [{name: getattr(each, name) for name in ("image_path", "question", "answer")} for each in examples]
            flags[f"{split}_file"] = write_lines(folder / f"{split}.jsonl", lines)
        started = time.perf_counter()
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "finetune_moondream.py"), *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        records = [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]
        return records[1]["seconds"], time.perf_counter() - started - records[1]["seconds"], usage.ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the text model")
    parser.add_argument("--vision_layers", type=int, default=27)
    parser.add_argument("--tiny", action="store_true", help="the small checkpoint instead")
    parser.add_argument("--release", choices=SMALL, default="2024-08-26", help="of Moondream2")
    parser.add_argument("--questions_per_picture", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--memory_batch_size", type=int, default=2, help="for the peak memory; 0: not measured")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="for this project's peak memory")
    parser.add_argument("--lora_rank", type=int, help="instead: times of adapters of that rank; of --side, its memory")
    parser.add_argument("--pictures", type=int, help="in a turn; default: as many as fill a batch")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument(
        "--lines", type=int, nargs="*", help="instead: whole runs on the small checkpoint, so many lines"
    )
    parser.add_argument("--loading", action="store_true", help="instead: peak memory of loading a checkpoint")
    parser.add_argument("--side", choices=("plain", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return measure_peak(arguments)
    if arguments.loading:
        return loading(arguments)
    if arguments.lora_rank:
        return measure_adapters(arguments)
    if arguments.lines:
        print(f"{'lines':>8} {'epoch, s':>9} {'ms a line':>10} {'the rest, s':>12} {'peak GiB':>9}")
        for count in arguments.lines:
            epoch, rest, gib = growth(count)
            print(f"{count:>8} {epoch:>9.1f} {1000 * epoch / count:>10.1f} {rest:>12.1f} {gib:>9.2f}", flush=True)
        return None

    result, shares = {}, []

    def row(*cells):
        print(
            "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, (19, 14, 14, 15, 22), strict=True)), flush=True
        )

    peaks = {side: peak(arguments, side) for side in ("plain", "ours") if arguments.memory_batch_size}
    model, tokenizer = build(arguments), AutoTokenizer.from_pretrained(SMALL[arguments.release])
    row("questions a picture", "s a question", "tokens/s", "ratio (spread)", "GFLOP/s, of a matmul's")
    for questions in arguments.questions_per_picture:
        seconds, tokens, (rate, matmul) = compare(arguments, model, tokenizer, questions)
        plain, ours = (statistics.median(seconds[name]) for name in ("plain", "ours"))
        ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
        row(f"{questions}, plain", f"{plain:.3f}", f"{tokens / plain:.0f}", "", "")
        rates = f"{rate / 1e9:.0f} of {matmul / 1e9:.0f}"
        row(f"{questions}, ours", f"{ours:.3f}", f"{tokens / ours:.0f}", f"{statistics.median(ratios):.2f}", rates)
        row("", "", "", f"({min(ratios):.2f} to {max(ratios):.2f})", "")
        result[f"ratio_{questions}_question{'s' if questions > 1 else ''}"] = round(statistics.median(ratios), 3)
        shares.append(rate / matmul)
    if peaks:
        peak_of = ", ".join(f"{gib:.2f} {side}" for side, gib in peaks.items())
        print(f"Peak memory in GiB at BATCH_SIZE {arguments.memory_batch_size}: {peak_of}")
    result["share_of_matmul_rate"] = round(min(shares), 3)
    result |= {f"peak_gib_{side}": round(gib, 2) for side, gib in peaks.items()}
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
