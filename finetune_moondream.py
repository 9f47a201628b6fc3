"""Fine-tunes Moondream2 on your own pictures and questions: edit the constants, run the file.

A run in the order of this file: data, model, loss and answers, training, saving. Data is two files of lines
`{"image_path": ..., "question": ..., "answer": ...}`. README.md tells what a user asks next.
"""

import importlib.util
import json
import math
import random
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from moondream2 import cli
from moondream2.card import how_to_ask, model_card, predictions, report_of
from moondream2.checkpoints import (
    Checkpoints,
    Interrupted,
    Progress,
    Stop,
    leave_signals,
    move_into,
    only_run_in,
    refuse_finished,
    resume_or_start,
    settings_of,
)
from moondream2.cli import InputError
from moondream2.data import read_lines
from moondream2.features import FeatureStore, keep_features
from moondream2.files import write_text, write_whole
from moondream2.launch import from_main, gather, one_speaks, share, start, whole_weights
from moondream2.loading import load_model, load_tokenizer
from moondream2.modeling_moondream2 import Moondream, prompt_text, row_mask
from moondream2.optimizer import build_optimizer, build_scheduler
from moondream2.pictures import PictureError, find_picture, inspect_all
from moondream2.report import write_report
from moondream2.rows import Collator, StepSampler, whole_rows
from moondream2.scoring import is_correct
from moondream2.summary import format_table, summarize

# Each constant is also a flag: `EPOCHS` is `--epochs 3` on the command line.
MODEL_ID: str = "vikhyatk/moondream2"  # a hub repository or a local folder
REVISION: str = "92d3d73b6fd61ab84d9fe093a9c7fd8c04bf2c0d"  # of the hub: the commit of 2024-08-26; tags can move
TRAIN_FILE: str = "train.jsonl"  # one {"image_path", "question", "answer"} a line
VALID_FILE: str = "valid.jsonl"  # other pictures than those in TRAIN_FILE: they judge each epoch
OUTPUT_DIR: str = "./moondream_crosswalks_finetuned"  # the saved model, the log and the report
FEATURES_DIR: str | None = "./picture_features"  # what the encoder says of each picture, 3 MB each; None: not kept
EPOCHS: int = 5  # passes over the training data; the best one is saved, so more cost only time
BATCH_SIZE: int = 2  # questions in a micro-batch of one process (GPU): the most that fits, then GRAD_ACCUM_STEPS
GRAD_ACCUM_STEPS: int = 1  # micro-batches in an optimizer step
GROUP_BY_PICTURE: bool = True  # draw a picture's questions together: faster, as they share it; losses were no worse
LEARNING_RATE: float = 3e-5  # small, as every weight of the text model moves
LR_SCHEDULE: str = "constant"  # constant, linear or cosine, over optimizer steps
WARMUP_STEPS: int = 0  # optimizer steps over which the rate rises from 0
WEIGHT_DECAY: float = 0.01  # a step, times the rate; norms and biases are exempt
BETAS: tuple[float, float] = (0.9, 0.999)  # AdamW's: how much of its means of gradients and their squares a step keeps
MAX_GRAD_NORM: float = 1.0  # longer gradients are scaled down to this
GRADIENT_CHECKPOINTING: bool = False  # compute activations twice instead of keeping them: a third slower, leaner
PATIENCE: int | None = None  # stop after so many epochs without a better validation loss; None: never
VALID_ANSWERS: int = 1000  # validation questions answered before training and after each epoch, at most
CHECKPOINT_STEPS: int = 1000  # optimizer steps between checkpoints, besides one an epoch
OVERWRITE: bool = False  # replace a finished model, or discard a run of other settings, in OUTPUT_DIR
TRACKER: str | None = None  # "tensorboard", "wandb", "trackio": where losses go besides OUTPUT_DIR
SEED: int = 0  # of the order in which examples are drawn

MAY_BE_ZERO = ("WARMUP_STEPS", "WEIGHT_DECAY", "VALID_ANSWERS", "SEED")
BELOW_ONE = ("BETAS",)
CHOICES = {"LR_SCHEDULE": ("constant", "linear", "cosine"), "TRACKER": ("tensorboard", "wandb", "trackio")}
MAY_CHANGE = ("EPOCHS", "OUTPUT_DIR", "FEATURES_DIR", "PATIENCE", "CHECKPOINT_STEPS", "OVERWRITE", "TRACKER")
MAY_CHANGE += ("GRADIENT_CHECKPOINTING",)  # the same numbers in less memory
MAX_NEW_TOKENS = 64  # an answer that is longer is cut off
WORKERS = 4  # processes that decode pictures and read features, on a GPU
BAD_STEPS = 3  # steps in a row without a finite gradient that end a run

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Example:
    """A line: `place` is its file:line, `picture` the key of what its picture shows."""

    place: str
    image_path: str
    question: str
    answer: str
    picture: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)


class VQADataset(Dataset):
    """The examples of a JSONL file whose pictures can be used.

    Attributes:
        examples: list of Example.
        pictures: {key: Picture}, one for each different content.
        skipped: list of (place, reason) of the lines left out.
    Raises:
        InputError: the file can't be read, lines are malformed, or no example is left.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.examples, self.pictures, self.skipped = [], {}, []
        lines = [Example(place, **texts) for place, texts in read_lines(self.path)]
        found = {name: find_picture(self.path, name) for name in dict.fromkeys(line.image_path for line in lines)}
        inspected = inspect_all({file for file in found.values() if file is not None})
        for line in lines:
            picture = inspected.get(found[line.image_path])
            if picture is None:
                self.skipped.append((line.place, f"picture not found: {line.image_path}"))
            elif isinstance(picture, PictureError):
                self.skipped.append((line.place, f"picture broken: {line.image_path}: {picture}"))
            else:
                line.picture = self.pictures.setdefault(picture.key, picture).key
                self.examples.append(line)
        self.require_examples()

    def tokenize(self, tokenizer, room):
        """Gives each example its token ids and leaves out those with more than `room` of them."""
        if not tokenizer.eos_token_id == tokenizer.bos_token_id is not None:
            raise InputError("the tokenizer is not Moondream2's: its texts begin and end with <|endoftext|>")
        prompts = [prompt_text(example.question) for example in self.examples]
        answers = [f" {example.answer}" for example in self.examples]
        prompts, answers = (tokenizer(texts, add_special_tokens=False).input_ids for texts in (prompts, answers))
        fitting = []
        for example, prompt, answer in zip(self.examples, prompts, answers, strict=True):
            example.prompt_ids, example.answer_ids = prompt, [*answer, tokenizer.eos_token_id]
            tokens = len(prompt) + len(answer) + 1
            if tokens <= room:
                fitting.append(example)
            else:
                self.skipped.append((example.place, f"too long: {tokens} tokens behind the picture, {room} fit"))
        self.examples = fitting
        self.pictures = {key: self.pictures[key] for key in dict.fromkeys(example.picture for example in fitting)}
        self.require_examples()

    def require_examples(self):
        if not self.examples:
            reasons = "\n".join(f"  {place}: {reason}" for place, reason in self.skipped[:10])
            raise InputError(f"{self.path} has no example that can be used\n{reasons}".strip())

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def print_skipped(dataset, most=5):
    """How many lines were left out, and the first of them."""
    if dataset.skipped:
        print(f"{dataset.path}: {len(dataset.skipped)} lines skipped, {len(dataset)} left")
        print("\n".join(f"  {place}: {reason}" for place, reason in dataset.skipped[:most]))


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def print_parameters(model):
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"Trainable parameters: {trainable:,} of {sum(p.numel() for p in model.parameters()):,}")


# ---------------------------------------------------------------------------------------------------------------------
# Loss and answers
# ---------------------------------------------------------------------------------------------------------------------


def image_embeds(batch, vision_encoder, store, device):
    """The (rows, 729, 2048) features of a batch; pictures that came as pixels are encoded, and stored. None of none."""
    features = [each for _, each in batch["pictures"]]
    fresh = [r for r, each in enumerate(features) if each.dim() == 3]
    if fresh:
        with torch.no_grad():
            encoded = vision_encoder([features[r] for r in fresh])
        for r, each in zip(fresh, encoded, strict=True):
            features[r] = each
            store.save(batch["pictures"][r][0].key, each)
    return torch.stack([each.to(device, non_blocking=True) for each in features]) if features else None


def forward(text_model, batch, embeds, num_items=1, use_cache=False):
    """The text model's output on a batch; its loss is summed over the answer tokens, then divided by `num_items`."""
    names, device = ("input_ids", "position_ids", "labels", "scored", "segments"), next(text_model.parameters()).device
    tensors = {name: batch[name].to(device, non_blocking=True) for name in names}
    segments = tensors.pop("segments")
    # Rows of one question need no mask: causal attention never looks at the padding behind them.
    tensors["attention_mask"] = row_mask(segments) if any(len(row) > 1 for row in batch["examples"]) else None
    return text_model(**tensors, image_embeds=embeds, num_items_in_batch=num_items, use_cache=use_cache)


@torch.no_grad()
def evaluate(run):
    """Validation Avg Loss, the mean over all answer tokens, in which each example counts once; and {place: answer}.

    VALID_ANSWERS of the examples are asked, drawn by SEED. A row is read once for both.
    """
    run.model.eval()
    places = [example.place for example in run.valid]
    asked = set(random.Random(run.constants.seed).sample(places, min(len(places), run.constants.valid_answers)))
    batches = whole_rows(run.valid, range(len(run.valid)), 4 * run.constants.batch_size, run.room)
    losses, tokens, answers = [], 0, {}
    for number, batch in enumerate(collated(run, run.valid, share(run.accelerator, batches), "Validating")):
        if run.accelerator.num_processes == 1 or number % 16 == 0:  # to agree, processes wait for their devices
            run.stop.check()
        if batch["examples"]:
            embeds = image_embeds(batch, run.model.vision_encoder, run.store, run.device)
            wanted = any(example.place in asked for row in batch["examples"] for example in row)
            out = forward(run.model.text_model, batch, embeds, use_cache=wanted)
            losses.append(out.loss)
            tokens += len(batch["scored"])
            answers |= answer(run, batch, out, asked) if wanted else {}
            del out  # and its keys and values, before the next batch makes its own
    losses, tokens = gather(torch.stack(losses).tolist() if losses else []), sum(gather([tokens]))
    if not tokens:
        raise InputError(f"no picture of {run.constants.valid_file} can be read any more")
    return math.fsum(losses) / tokens, dict(gather(list(answers.items())))


def answer(run, batch, out, asked):
    """Greedy answers to those of a batch's examples that are asked, going on from the pass that gave their loss."""
    rows, scored = batch["examples"], batch["scored"]
    examples = [example for row in rows for example in row]
    first = scored.diff(prepend=scored[:1] - 2) > 1  # of what predicts an answer: a prompt lies between two answers

    def in_rows(values, padding=0):
        return pad_sequence(values.split([len(row) for row in rows]), True, padding).to(run.device)

    token = in_rows(out.logits.argmax(-1)[first.to(run.device)])
    position_ids = in_rows(batch["position_ids"].flatten()[scored[first]] + 1)
    done = in_rows(torch.tensor([example.place not in asked for example in examples]), True)
    unseen = batch["labels"] != -100  # the true answers
    segments = batch["segments"].masked_fill(unseen, -1).to(run.device)
    eos = run.tokenizer.eos_token_id
    ids = run.model.decode(token, position_ids, done, segments, out.past_key_values, eos, MAX_NEW_TOKENS)
    ids = [each for row, answers in zip(rows, ids, strict=True) for each in answers[: len(row)]]
    texts = [text.strip() for text in run.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return {each.place: text for each, text in zip(examples, texts, strict=True) if each.place in asked}


def accuracy(dataset, answers):
    """The share of the answered examples whose answer is right; None where none was asked."""
    right = [is_correct(answers[each.place], each.answer) for each in dataset.examples if each.place in answers]
    return sum(right) / len(right) if right else None


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """Everything that a run holds, from its first step to its saved model; `prepare` puts it together."""

    constants: SimpleNamespace
    accelerator: Accelerator
    stop: Stop
    output_dir: Path
    train: VQADataset
    valid: VQADataset
    data: dict  # their summary
    room: int  # tokens that fit behind a picture
    model: Moondream
    text_model: torch.nn.Module  # the model's, as accelerate wraps it
    tokenizer: PreTrainedTokenizerBase
    store: FeatureStore
    collate: Collator
    sampler: StepSampler
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    checkpoints: Checkpoints
    progress: Progress

    def __init__(self, **parts):
        vars(self).update(parts)

    @property
    def device(self):
        return self.accelerator.device


def collated(run, dataset, batches, title, done=0):
    """The collated batches, behind a progress bar, read ahead by worker processes where a GPU would wait for them."""
    is_cuda = run.device.type == "cuda"
    data = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=run.collate,
        num_workers=WORKERS if is_cuda else 0,
        pin_memory=is_cuda,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # a loader seeds its workers; from the global one training would miss the draw
    )
    shown = {"unit": "", "leave": False, "mininterval": 0.5, "disable": not run.accelerator.is_main_process}
    with tqdm(data, title, len(batches) + done, initial=done, **shown) as bar:
        for batch in bar:
            report_failed(run.progress, batch["failed"])
            yield batch
            if run.progress.tokens:
                bar.set_postfix_str(f"loss {run.progress.loss_sum / run.progress.tokens:.4f}", refresh=False)


def report_failed(progress, failed):
    """Says which examples fell out because their picture disappeared or broke during the run, each once."""
    known = {place for place, _ in progress.left_out}
    for place, reason in failed:
        if place not in known:
            progress.left_out.append([place, reason])
            tqdm.write(f"left out {place}: {reason} ({len(progress.left_out)} so far)", sys.stderr)


def train_step(run, batches):
    """One optimizer step over the answer tokens of some micro-batches, and of those of the other processes.

    Returns the mean loss, the gradient's length before clipping, and the number of tokens. Where loss or gradient is
    not finite, nothing is updated.
    """
    accelerator, model = run.accelerator, run.text_model
    tokens = torch.full((), float(sum(len(batch["scored"]) for batch in batches)), device=run.device)
    tokens, losses = accelerator.reduce(tokens), []
    divisor = tokens.clamp(min=1) / accelerator.num_processes  # for gradients are averaged over processes
    for batch in batches:
        # Gradients are exchanged once, in the last backward pass; sharded ones at once, as no process has room for all.
        at_once = batch is batches[-1] or accelerator.is_fsdp2
        if not batch["examples"] and not at_once:
            continue  # sharing pictures left a step fewer rows than it has micro-batches
        with nullcontext() if at_once else accelerator.no_sync(model):
            embeds = image_embeds(batch, run.model.vision_encoder, run.store, run.device)
            loss = forward(model, batch, embeds, divisor).loss
            accelerator.backward(loss)
        losses.append(loss.detach())
    loss = accelerator.reduce(torch.stack(losses).sum(), "mean")
    norm = accelerator.clip_grad_norm_(model.parameters(), run.constants.max_grad_norm)
    norm = norm.full_tensor() if accelerator.is_fsdp2 else norm
    loss, norm, tokens = torch.stack([loss, norm.float(), tokens]).tolist()
    if tokens and math.isfinite(loss) and math.isfinite(norm):
        run.optimizer.step()
        run.scheduler.step()
    run.optimizer.zero_grad()
    return loss, norm, int(tokens)


def train_epoch(run):
    """The steps of the epoch under way that are still to be done."""
    progress, constants, sampler = run.progress, run.constants, run.sampler
    sampler.epoch, sampler.first_step = progress.epoch, progress.step
    run.model.train()
    title, done = f"Epoch {progress.epoch} of {constants.epochs}", progress.step * sampler.accum
    batches, bad, clock = [], 0, time.monotonic() - progress.seconds
    for batch in collated(run, run.train, sampler, title, done):
        batches.append(batch)
        if len(batches) < sampler.accum:
            continue
        loss, norm, tokens = train_step(run, batches)
        if math.isfinite(loss) and math.isfinite(norm):
            bad = 0
            progress.loss_sum += loss * tokens
            progress.tokens += tokens
        else:
            bad += 1
            report_bad_step(batches, loss, norm, bad)
        batches = []
        progress.step += 1
        progress.seconds = time.monotonic() - clock
        step = (progress.epoch - 1) * sampler.steps + progress.step
        scores = {"train_loss": loss, "grad_norm": norm, "learning_rate": run.optimizer.param_groups[0]["lr"]}
        run.accelerator.log(scores, step)
        run.stop.check()
        if step % constants.checkpoint_steps == 0 and not bad:
            checkpoint(run)


def checkpoint(run, is_best=False):
    run.checkpoints.save(run.accelerator, run.text_model, run.optimizer, run.scheduler, run.progress, is_best)


def report_bad_step(batches, loss, norm, bad):
    """Names the examples of a step that was not applied; ends the run after a few in a row."""
    places = [example.place for batch in batches for row in batch["examples"] for example in row]
    tqdm.write(f"Step not applied: loss {loss}, gradient {norm}; its examples: {', '.join(places)}", sys.stderr)
    if bad == BAD_STEPS:
        raise InputError(
            f"{bad} steps in a row without a finite loss and gradient: a lower LEARNING_RATE may help; "
            "the last checkpoint is kept"
        )


def finish_epoch(run):
    """Validates, answers, records the epoch, and checkpoints it with the best epoch's weights."""
    progress, constants = run.progress, run.constants
    clock = time.monotonic() - progress.seconds
    with whole_weights(run.text_model):
        valid_loss, answers = evaluate(run)
    record = {
        "epoch": progress.epoch,
        "train_loss": progress.loss_sum / progress.tokens if progress.tokens else None,
        "valid_loss": valid_loss,
        "valid_accuracy": accuracy(run.valid, answers),
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "seconds": round(time.monotonic() - clock, 3),
    }
    trained = [each["valid_loss"] for each in progress.history if each["epoch"]]
    is_best = progress.epoch > 0 and (not trained or valid_loss < min(trained))
    if is_best:
        progress.best_epoch, progress.answers_best = progress.epoch, answers
    if not progress.epoch:
        progress.answers_before = answers
    progress.history.append(record)
    progress.epoch, progress.step = progress.epoch + 1, 0
    progress.loss_sum, progress.tokens, progress.seconds = 0.0, 0, 0.0
    before = progress.history[0]["valid_accuracy"]
    print_record(record, before, run.data["baseline_accuracy"], constants.epochs)
    if record["epoch"]:
        checkpoint(run, is_best)
    write_log(run)
    scores = {name: record[name] for name in ("valid_loss", "valid_accuracy") if record[name] is not None}
    run.accelerator.log(scores, record["epoch"] * run.sampler.steps)


def write_log(run):
    if run.accelerator.is_main_process:
        records = "".join(json.dumps(record) + "\n" for record in run.progress.history)
        write_text(run.output_dir / "training_log.jsonl", records)


def print_record(record, before, baseline, epochs):
    """One line: losses and accuracy, beside the accuracy before training and of the most frequent answers."""
    name = f"Epoch {record['epoch']} of {epochs}" if record["epoch"] else "Before training"
    parts = [] if record["train_loss"] is None else [f"Training Avg Loss: {record['train_loss']:.4f}"]
    parts.append(f"Validation Avg Loss: {record['valid_loss']:.4f}")
    if record["valid_accuracy"] is not None:
        start = f"before training {before:.1%}, " if record["epoch"] else ""
        parts.append(f"Validation accuracy: {record['valid_accuracy']:.1%} ({start}baseline {baseline:.1%})")
    print(f"{name}: {', '.join(parts)}, {record['seconds']:.0f} s", flush=True)


def train(run):
    """Epoch after epoch, to the last or until patience ends; asked to stop, it leaves a checkpoint."""
    progress, constants = run.progress, run.constants
    try:
        while progress.epoch <= constants.epochs:
            waited = progress.epoch - 1 - progress.best_epoch
            if progress.best_epoch and constants.patience is not None and waited >= constants.patience:
                print(f"No better validation loss for {waited} epochs: stopping early.")
                break
            if progress.epoch:
                train_epoch(run)
            finish_epoch(run)
    except Interrupted:
        if progress.epoch:
            checkpoint(run)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def save(run):
    """Puts the best epoch's model, its card, the answers and the report into OUTPUT_DIR; the checkpoints go."""
    weights = run.model.state_dict()
    for name, tensor in load_file(run.checkpoints.newest() / "best.safetensors").items():
        weights[f"text_model.{name}"] = tensor
    folder = run.checkpoints.folder / "model"
    with write_whole(folder) as beside:
        run.model.config.auto_map = {}  # the hub's; save_pretrained enters this project's own file
        run.model.save_pretrained(beside, state_dict=weights)
        run.tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(model_card(run), encoding="utf-8")
    write_log(run)  # again: a run that was killed between checkpoint and log comes here at once
    answers = predictions(run)
    write_text(run.output_dir / "predictions.jsonl", "".join(json.dumps(each) + "\n" for each in answers))
    write_report(run.output_dir / "report.html", report_of(run, answers))
    move_into(folder, run.output_dir, last="config.json")
    run.checkpoints.discard()


def print_best(progress, epochs):
    losses = {each["epoch"]: each["valid_loss"] for each in progress.history if each["epoch"]}
    print(f"Best epoch: {progress.best_epoch} of {epochs} (Validation Avg Loss {losses[progress.best_epoch]:.4f})")
    after = [f"{loss:.4f}" for epoch, loss in losses.items() if epoch > progress.best_epoch]
    if after:
        print(f"What followed was worse and is not in the saved model: {', '.join(after)}")


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def read_data(constants, tokenizer, room):
    """Both datasets, ready to train on, and the summary of them that is printed."""
    files = constants.train_file, constants.valid_file
    for file in files:
        read_lines(Path(file))  # what is malformed in either is said before thousands of pictures are looked at
    train, valid = map(VQADataset, files)
    for dataset in (train, valid):
        dataset.tokenize(tokenizer, room)
        print_skipped(dataset)
    data = summarize(train, valid)
    print(format_table(data))
    return train, valid, data


def prepare(constants, accelerator, stop):
    """All that a run needs before its first step: data, model, features, optimizer, and where it stands."""
    run = Run(constants=constants, accelerator=accelerator, stop=stop, output_dir=Path(constants.output_dir))
    with accelerator.main_process_first():
        config, run.tokenizer = load_tokenizer(constants.model_id, constants.revision)
    run.room = config.text_config.max_position_embeddings - 1 - config.image_tokens
    run.train, run.valid, run.data = from_main(accelerator, read_data, constants, run.tokenizer, run.room)
    with accelerator.main_process_first():
        run.model = model = load_model(constants.model_id, constants.revision)
    model.vision_encoder.requires_grad_(False)
    print_parameters(model)
    model.to(accelerator.device)
    if constants.gradient_checkpointing:
        model.activation_checkpointing_enable()

    shape = (config.image_tokens, config.text_config.hidden_size)
    run.store = FeatureStore(constants.features_dir, model.vision_encoder, shape)
    run.checkpoints = Checkpoints(run.output_dir)
    settings = settings_of(constants, MAY_CHANGE, run.train, run.valid, run.store.key)
    step_size = constants.batch_size * constants.grad_accum_steps * accelerator.num_processes
    run.progress = from_main(accelerator, resume_or_start, run.checkpoints, settings, step_size, constants.overwrite)
    pictures = run.train.pictures | run.valid.pictures
    keep_features(list(pictures.values()), model.vision_encoder, run.store, accelerator, WORKERS, stop.check_alone)
    run.collate = Collator(model, run.tokenizer, run.store, pictures)

    order = run.progress.step_size, constants.batch_size, constants.group_by_picture, constants.seed
    run.sampler = StepSampler(run.train, *order, accelerator.process_index, accelerator.num_processes)
    print_batch(run.sampler, constants.batch_size)
    optimizer = build_optimizer(model.text_model, constants.learning_rate, constants.weight_decay, constants.betas)
    steps = constants.epochs * run.sampler.steps
    run.scheduler = build_scheduler(optimizer, constants.lr_schedule, constants.warmup_steps, steps)
    run.text_model, run.optimizer = accelerator.prepare(model.text_model, optimizer)
    run.checkpoints.load(accelerator, run.text_model, run.optimizer, run.scheduler)
    return run


def print_batch(sampler, batch_size):
    parts = f"{sampler.processes} processes x BATCH_SIZE {batch_size} x {sampler.accum} micro-batches"
    print(f"An optimizer step takes {sampler.step_size} questions: {parts}; an epoch has {sampler.steps} steps")


def main():
    constants = cli.parse(globals(), sys.argv[1:], MAY_BE_ZERO, BELOW_ONE, CHOICES)
    output_dir = Path(constants.output_dir)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="PIL")  # of files that are read all the same; broken ones are named
    if constants.tracker and not importlib.util.find_spec(constants.tracker):
        raise InputError(f"TRACKER {constants.tracker!r} needs its package: pip install {constants.tracker}")
    accelerator = start(log_with=constants.tracker, project_dir=output_dir)
    with one_speaks(accelerator), only_run_in(output_dir) if accelerator.is_main_process else nullcontext():
        from_main(accelerator, refuse_finished, output_dir, constants.overwrite)
        accelerator.init_trackers("finetune_moondream", {name: str(value) for name, value in vars(constants).items()})
        try:
            run = prepare(constants, accelerator, Stop(accelerator))
            train(run)
        except Interrupted as interrupted:
            print(f"Stopped by {interrupted}. The same command goes on from there.")
            sys.exit(128 + interrupted.signum)
        if accelerator.is_main_process:
            save(run)
            print_best(run.progress, constants.epochs)
            print(f"Saved to {output_dir}, with report.html to look at. To ask it:\n")
            print(how_to_ask(constants.output_dir, run.valid[0]))
        accelerator.wait_for_everyone()
        accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
