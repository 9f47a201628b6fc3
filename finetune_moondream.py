"""Fine-tunes Moondream2 on your own pictures and questions: edit the constants, run the file.

A run in the order of this file: data, model, loss, training, saving. Data is files of lines
`{"image_path": ..., "question": ..., "answer": ...}`. README.md tells what a user asks next.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import transformers
from accelerate import Accelerator
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from moondream2 import adapters, cli, log
from moondream2.card import how_to_ask, model_card
from moondream2.checkpoints import Checkpoints, Interrupted, Progress, Stop, resume_or_start, settings_of
from moondream2.cli import InputError, MayChange, Share
from moondream2.compilation import compile_layers
from moondream2.data import Example, hold_out, read_lines, tokenize
from moondream2.evaluation import accuracy_of, draw_questions, evaluate, most_new_tokens
from moondream2.features import FeatureStore, image_embeds, keep_features
from moondream2.launch import end, first_on_each_machine, from_main, one_speaks, own_batches, start, start_tracker, sums
from moondream2.loading import checked_loading, choose_views
from moondream2.machine import row_multiple
from moondream2.optimizer import Sent, build_optimizer, build_scheduler, gradient_norm
from moondream2.output_dir import OutputDir
from moondream2.pace import Pace
from moondream2.pictures import KnownPictures, PictureError, find_pictures, read_ahead, set_up_pillow
from moondream2.report import facts_of_run, sets_of, write_report
from moondream2.rows import StepSampler, in_steps, lay_out, text_inputs, whole_rows
from moondream2.scoring import baseline_accuracy
from moondream2.summary import format_table, remarked, summarize

# Edit the values; each is also a flag: `EPOCHS = 5` is `--epochs 5` on the command line. What stands between name and
# value says what is allowed; MayChange, that it may be another when an interrupted run goes on.

# What is trained, and on what ----------------------------------------------------------------------------------------
MODEL_ID: str = "vikhyatk/moondream2"  # a hub repository or a local folder
REVISION: str = "92d3d73b6fd61ab84d9fe093a9c7fd8c04bf2c0d"  # of the hub: the commit of 2024-08-26; tags can move
TRAIN_FILE: str = "train.jsonl"  # one {"image_path", "question", "answer"} a line
VALID_FILE: str | None = "valid.jsonl"  # other pictures, which judge each epoch; None: a tenth of TRAIN_FILE's
TEST_FILE: str | None = None  # pictures that have no say in training: the model answers them before it and at the end
OUTPUT_DIR: MayChange[str] = "./moondream_crosswalks_finetuned"  # the saved model, the log and the report
TILES: bool = True  # False: all is learned and asked in one view, as llama.cpp and Ollama see a large picture, too

# How: most people edit no further than this --------------------------------------------------------------------------
EPOCHS: MayChange[PositiveInt] = 5  # passes over the training data; the best one is saved, so more cost only time
BATCH_SIZE: PositiveInt = 2  # questions in a micro-batch of one GPU: the most that fits, then GRAD_ACCUM_STEPS
LEARNING_RATE: PositiveFloat = 3e-5  # small, as every weight of the text model moves; adapters want more
LORA_RANK: PositiveInt | None = None  # None: every weight; 16: adapters, alpha twice the rank, LEARNING_RATE 3e-4

# The machine ---------------------------------------------------------------------------------------------------------
GRAD_ACCUM_STEPS: PositiveInt = 1  # micro-batches in an optimizer step
GRADIENT_CHECKPOINTING: MayChange[bool] = False  # True: a third slower and leaner, by computing activations twice
COMPILE: MayChange[bool] = False  # True: fewer, larger kernels on a GPU, after a minute or two; for long runs
GROUP_BY_PICTURE: bool = True  # draw a picture's questions together: faster, as they share it; losses were no worse
FEATURES_DIR: MayChange[str | None] = "./picture_features"  # the encoder's results, 3 MB a picture; None: not kept

# The optimizer -------------------------------------------------------------------------------------------------------
LR_SCHEDULE: Literal["constant", "linear", "cosine"] = "constant"  # linear and cosine fall to 0 by the last step
WARMUP_STEPS: NonNegativeInt = 0  # optimizer steps in which the rate rises to LEARNING_RATE
WEIGHT_DECAY: NonNegativeFloat = 0.01  # a step, times the rate; norms and biases are exempt
BETAS: tuple[Share, Share] = (0.9, 0.999)  # AdamW's: how much of its means of gradients and their squares a step keeps
MAX_GRAD_NORM: PositiveFloat = 1.0  # longer gradients are scaled down to this

# Judging and keeping -------------------------------------------------------------------------------------------------
PATIENCE: MayChange[PositiveInt | None] = None  # stop after so many epochs without a better loss; None: never
VALID_ANSWERS: NonNegativeInt = 1000  # validation questions answered before training and after each epoch, at most
CHECKPOINT_MINUTES: MayChange[PositiveFloat] = 15  # between two checkpoints, 8.5 GB each: what a power cut can cost
OVERWRITE: MayChange[bool] = False  # replace a finished model, or discard a run of other settings, in OUTPUT_DIR
TRACKER: MayChange[Literal["tensorboard", "wandb", "trackio"] | None] = None  # where losses go besides OUTPUT_DIR
SEED: NonNegativeInt = 0  # of the order in which examples are drawn

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class VQADataset(Dataset):
    """The examples of a JSONL file whose pictures can be used.

    Args:
        lines: of `read_lines`.
        found: {image_path: Picture, or the PictureError that says why there is none}.
    Attributes:
        examples: list of Example.
        pictures: {key: Picture}, one for each different content.
        skipped: list of (source, reason) of the lines left out.
        remarks: {key: list of what is to be said of a picture}, once all are decoded.
    Raises:
        InputError: no example is left.
    """

    def __init__(self, path, lines, found, config, tokenizer):
        self.path, self.examples, self.pictures, self.skipped, self.remarks = Path(path), [], {}, [], {}
        for line, (prompt_ids, answer_ids) in zip(lines, tokenize(lines, config, tokenizer), strict=True):
            picture, tokens = found[line.image_path], len(prompt_ids) + len(answer_ids)
            if line.lacks:
                self.skipped.append((line.source, line.lacks))
            elif isinstance(picture, PictureError):  # missing, or broken
                self.skipped.append((line.source, picture.reason(line.image_path)))
            elif tokens > config.max_text_tokens:
                self.skipped.append((line.source, f"too long: {tokens} tokens of text, {config.max_text_tokens} fit"))
            else:
                self.pictures.setdefault(picture.key, picture)
                self.examples.append(Example(*line, picture.key, prompt_ids, answer_ids))
        self.require_examples()

    def leave_out(self, broken):
        """Skips the examples whose picture could not be decoded; `broken` is {key: reason}. Returns what it skipped."""
        skipped = [
            (example.source, PictureError(broken[example.picture]).reason(example.image_path))
            for example in self.examples
            if example.picture in broken
        ]
        self.skipped += skipped
        self.examples = [example for example in self.examples if example.picture not in broken]
        self.pictures = {key: picture for key, picture in self.pictures.items() if key not in broken}
        self.require_examples()
        return skipped

    def require_examples(self):
        if not self.examples:
            reasons = "\n".join(f"  {source}: {reason}" for source, reason in self.skipped[:10])
            raise InputError(f"{self.path} has no example that can be used\n{reasons}".strip())

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def read_data(constants, config, tokenizer, stop):
    """The datasets of training, validation and, if there is a file for it, test, and a table of what is in them.

    What is malformed in any of the files is said before a picture is read.
    """
    names = constants.train_file, constants.valid_file, constants.test_file
    files = [(Path(name), read_lines(Path(name), tokenizer.eos_token)) for name in names if name is not None]
    known, datasets = KnownPictures(constants.features_dir), []
    for path, lines in files:
        found = find_pictures(path, lines, known, stop.check_alone)
        datasets.append(VQADataset(path, lines, found, config, tokenizer))
        log.skipped(datasets[-1])
    if constants.valid_file is None:
        datasets.insert(1, hold_out(datasets[0]))
        log.held_out(*datasets[:2])
    print(format_table(summarize(*datasets)))
    return datasets


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model_id, revision):
    """Moondream2's configuration and tokenizer. No code of the hub is run, here or below."""
    with checked_loading(model_id, revision) as loaded:
        loaded.config = AutoConfig.from_pretrained(model_id, revision=revision, trust_remote_code=False)
        loaded.tokenizer = loaded.config.load_tokenizer(model_id, revision)
    return loaded.config, loaded.tokenizer


def load_model(model_id, revision, config=None, dtype=torch.bfloat16):
    """Moondream2, its vision encoder frozen; with another configuration than its own where one is given."""
    with checked_loading(model_id, revision) as loaded:
        model, loaded.info = AutoModelForCausalLM.from_pretrained(
            model_id, revision=revision, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    model.vision_encoder.requires_grad_(False)
    return model


def encode(datasets, vision_encoder, store, accelerator, stop):
    """Sends each picture through the encoder once, and leaves out what can't be decoded; returns {key: Picture}."""
    pictures = {key: picture for each in reversed(datasets) for key, picture in each.pictures.items()}
    files = [each.pictures for each in datasets]
    broken, remarks = keep_features(files, vision_encoder, store, accelerator, stop.together)
    for each in datasets:
        each.remarks = remarks
    log.decoded([line for each in datasets for line in each.leave_out(broken)], remarked(*datasets))
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def collate(rows, lay_out):
    """A micro-batch: rows of examples laid out as tensors, with their pictures and the targets of the loss."""
    batch = lay_out(rows)
    # Only answers are learned. Each of their tokens is the target of the position before it; all other positions,
    # whose labels would be -100, have no target and need not go through `lm_head`.
    targets = [token for row in batch["rows"] for example in row for token in example.answer_ids]
    return {**batch, "targets": torch.tensor(targets, dtype=torch.long)}


def answer_loss(text_model, batch, embeds, device):
    """The cross-entropy of a micro-batch's answer tokens, summed: `update` makes it the mean of the whole step's."""
    logits = text_model(**text_inputs(batch, device), image_embeds=embeds).logits  # (answer tokens, vocabulary)
    targets = batch["targets"].to(device, non_blocking=True)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Engine(NamedTuple):
    """What moves in training, as accelerate has prepared it."""

    accelerator: Accelerator
    text_model: torch.nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler


class Run(NamedTuple):
    """What the epochs of a run work with."""

    datasets: list[VQADataset]  # of training, validation and, if there is a file for it, test
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    engine: Engine
    progress: Progress
    stop: Stop
    pace: Pace
    sampler: StepSampler
    room: tuple[int, int, int]  # of a batch that judges, as `whole_rows` takes it
    read: Callable  # `read_batches`, filled in


def build_engine(model, accelerator, steps, constants):
    """AdamW over the text model's parameters, its schedule, and accelerate's preparations for one or several GPUs."""
    if constants.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if constants.compile:
        compile_layers(model.text_model, accelerator.is_fsdp2)
    optimizer = build_optimizer(model.text_model, constants.learning_rate, constants.weight_decay, constants.betas)
    scheduler = build_scheduler(optimizer, constants.lr_schedule, constants.warmup_steps, steps)
    text_model, _ = accelerator.prepare(model.text_model, optimizer)  # its wrapper of an optimizer waits for the GPU
    return Engine(accelerator, text_model, optimizer, scheduler)


def backward(engine, batches, vision_encoder):
    """Forward and backward passes over a step's micro-batches; returns their loss, summed over answer tokens."""
    accelerator, text_model, losses = engine.accelerator, engine.text_model, []
    for batch in batches:
        # Gradients are exchanged once, in the last backward pass; sharded ones at once, as no process has room for all.
        exchange = batch is batches[-1] or accelerator.is_fsdp2
        if not batch["rows"] and not exchange:
            continue  # sharing pictures left a step fewer rows than it has micro-batches
        with nullcontext() if exchange else accelerator.no_sync(text_model):
            embeds = image_embeds(batch["pictures"], vision_encoder, accelerator.device)
            loss = answer_loss(text_model, batch, embeds, accelerator.device)
            accelerator.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def update(engine, batches, loss, max_grad_norm, wishes):
    """Sends AdamW's update by clipped gradients to the device: none where loss or gradient turns out not finite."""
    accelerator, text_model, optimizer, scheduler = engine
    if accelerator.scaler:  # float16, where the loss is multiplied, lest gradients become 0
        accelerator.scaler.unscale_(optimizer)
        accelerator.scaler.update()  # to a smaller one where a gradient is not finite
    loss, tokens, *wishes = sums(accelerator, loss, sum(len(batch["targets"]) for batch in batches), *wishes)
    divisor = tokens.clamp(min=1) / accelerator.num_processes  # gradients are a sum's, averaged over processes
    loss, norm = loss / tokens.clamp(min=1), gradient_norm(text_model.parameters()) / divisor
    optimizer.grad_scale = divisor * ((norm + 1e-6) / max_grad_norm).clamp(min=1)
    optimizer.found_inf = 1 - ((tokens > 0) & loss.isfinite() & norm.isfinite()).float()
    sent = Sent(batches, optimizer, scheduler, [loss, norm, tokens, optimizer.found_inf, *wishes])
    optimizer.step()
    optimizer.zero_grad()
    return sent


def train_steps(engine, steps, vision_encoder, max_grad_norm, wishes=tuple):
    """An optimizer step over each of these lists of micro-batches; yields what came of it, a Step, but not at once."""
    sent = None
    for batches in steps:
        loss = backward(engine, batches, vision_encoder)
        if sent:  # waits for scores while the device has these passes to do; the next update's rate depends on them
            yield sent.settled()
        sent = update(engine, batches, loss, max_grad_norm, wishes())
    if sent:
        yield sent.settled()


def train_epoch(engine, steps, vision_encoder, progress, checkpoints, stop, constants):
    """The steps of the epoch under way that are still to be done; `steps` gives each one's micro-batches."""
    engine.text_model.train()
    bad, clock = 0, time.monotonic() - progress.seconds
    is_due = partial(checkpoints.is_due, constants.checkpoint_minutes)
    for step in train_steps(engine, steps, vision_encoder, constants.max_grad_norm, lambda: stop.wishes(is_due())):
        bad = 0 if step.is_applied else bad + 1
        if bad:
            log.bad_step(step, bad, engine.accelerator.scaler)
        else:
            progress.loss_sum += step.loss * step.tokens
            progress.tokens += step.tokens
        progress.step, progress.total_steps = progress.step + 1, progress.total_steps + 1
        progress.learning_rate = step.learning_rate
        progress.seconds = time.monotonic() - clock
        engine.accelerator.log(log.scores_of_step(step), progress.total_steps)
        if stop.heed(*step.wishes) and not bad:
            checkpoints.save(progress)


def finish_epoch(progress, valid_loss, answers, valid, seconds):
    """Enters the epoch into the history; returns its record, and whether its validation loss is the lowest so far."""
    is_best = progress.epoch > 0 and progress.is_best(valid_loss)
    if is_best:
        progress.best_epoch, progress.answers_best = progress.epoch, answers
    if progress.epoch == 0:
        progress.answers_before = answers
    record = {
        "epoch": progress.epoch,
        "train_loss": progress.loss_sum / progress.tokens if progress.tokens else None,
        "valid_loss": valid_loss if math.isfinite(valid_loss) else None,
        "valid_accuracy": accuracy_of(valid, answers),
        "learning_rate": progress.learning_rate,
        "left_out": len(progress.left_out),
        "seconds": round(seconds, 3),
    }
    progress.end_epoch(record)
    return record, is_best


def judge(run, dataset, title, asked):
    """Avg Loss of a dataset with the weights as they are now, and the answers to what is asked of it."""
    batches = own_batches(run.engine.accelerator, whole_rows(dataset, *run.room))
    with closing(run.read(batches, title, len(batches))) as batches:
        judged = evaluate(run.model, run.tokenizer, run.stop.heeded(batches), asked)
    run.progress.share_left_out()
    return judged


def take_test(run, train, test):
    """All questions of the test file, to the model as it came and then to the one that is saved."""
    loss, answers = judge(run, test, "Testing", {example.key for example in test})
    record = run.progress.enter_test(loss, accuracy_of(test, answers), answers)
    log.test(record, run.progress.history[0], baseline_accuracy(train, test))
    run.engine.accelerator.log(log.scores_of_test(record), run.progress.total_steps)


def read_batches(batches, title, total, done=0, *, lay_out, **shown):
    """The collated micro-batches, which threads read ahead, behind a progress bar."""
    return log.shown(read_ahead(partial(collate, lay_out=lay_out), batches), title, total, done, **shown)


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def save(model, tokenizer, best_weights, card, folder):
    """Fills a folder with the best epoch's model, complete in itself: weights, the model's code, tokenizer and card."""
    weights = model.state_dict() | {f"{model.text_name}.{name}": tensor for name, tensor in best_weights.items()}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def finish(constants, progress, checkpoints, output, merged, model, tokenizer, train, valid, test=None):
    """Puts into OUTPUT_DIR the best epoch's model, its answers and the report; the checkpoints go."""
    progress.require_best()
    log.best(progress, constants.epochs)
    output.write_lines("training_log.jsonl", progress.history)  # a run may have been killed before it wrote the last
    sets, device = sets_of(progress, train, valid, test), model.get_input_embeddings().weight.device
    output.write_lines("predictions.jsonl", sets[0]["predictions"])
    output.remove("test_predictions.jsonl")  # of a run that this one replaces
    if test:
        output.write_lines("test_predictions.jsonl", sets[1]["predictions"])
    log.verdict(sets)
    write_report(output.own("report.html"), facts_of_run(constants, progress, train, valid, sets, device, test))
    card = model_card(constants, progress, train, valid, test)
    with output.new_model() as folder:
        save(model, tokenizer, merged or checkpoints.best_weights(), card, folder)
        if merged:
            adapters.save(folder / adapters.FOLDER, model, checkpoints.best_weights(), constants)
    checkpoints.discard()
    print(f"Saved to {output.path}, with report.html to look at. To ask it:\n\n{how_to_ask(output.path, valid)}")


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def prepare(constants, accelerator, checkpoints, stop):
    """A Run that can begin, or go on from the last checkpoint: data read, model loaded, each picture encoded."""
    from_main(accelerator, adapters.refuse_or_warn, constants.lora_rank, constants.learning_rate)
    release = constants.model_id, constants.revision
    config, tokenizer = first_on_each_machine(accelerator, load_tokenizer, *release)
    choose_views(config, constants.model_id, constants.tiles)
    datasets = from_main(accelerator, read_data, constants, config, tokenizer, stop)
    dtype = torch.float16 if accelerator.scaler else torch.bfloat16
    model = first_on_each_machine(accelerator, load_model, *release, config, dtype)
    model = adapters.add(model, constants).to(accelerator.device)
    model.generation_config.max_new_tokens = most_new_tokens(datasets, config.max_text_tokens)
    log.parameters(model)

    store = FeatureStore(constants.features_dir, model)
    settings = settings_of(constants, cli.may_change(sys.modules[__name__]), datasets, store.key)
    progress = from_main(accelerator, resume_or_start, checkpoints, settings, constants, accelerator.num_processes)
    start_tracker(accelerator, constants, progress)
    pictures = encode(datasets, model.vision_encoder, store, accelerator, stop)

    order = progress.step_size, constants.batch_size, constants.group_by_picture, constants.seed
    process = accelerator.process_index, accelerator.num_processes, row_multiple(accelerator.device)
    sampler = StepSampler(datasets[0], config.prefix_tokens, *order, *process)
    log.step_size(sampler, constants.batch_size)
    engine = build_engine(model, accelerator, constants.epochs * sampler.steps, constants)
    checkpoints.watch(*engine)
    checkpoints.load()

    tokens = {"bos": tokenizer.bos_token_id, "image_tokens": config.image_tokens, "multiple": sampler.multiple}
    lay = partial(lay_out, pictures=pictures, store=store, **tokens)
    pace = Pace(model.text_model, accelerator, sampler, constants.epochs)
    read = partial(read_batches, lay_out=lay, progress=progress, is_shown=accelerator.is_main_process)
    room = config.prefix_tokens, 4 * constants.batch_size, config.max_text_tokens
    return Run(datasets, model, tokenizer, engine, progress, stop, pace, sampler, room, read)


def fine_tune(constants, accelerator, output, checkpoints, stop):
    """A run, from its data to its saved model."""
    run = prepare(constants, accelerator, checkpoints, stop)
    progress, sampler, (train, valid, *tests) = run.progress, run.sampler, run.datasets  # tests: one or none
    asked, baseline = draw_questions(valid, constants.valid_answers, constants.seed), baseline_accuracy(train, valid)
    with checkpoints.saved_at_the_end(progress):
        while progress.goes_on(constants.epochs, constants.patience):
            clock = time.monotonic() - progress.seconds
            if progress.epoch:
                title, done = f"Epoch {progress.epoch} of {constants.epochs}", progress.step * sampler.accum
                batches = chain.from_iterable(sampler.epoch(progress.epoch, progress.step))
                with closing(run.read(batches, title, sampler.steps * sampler.accum, done, pace=run.pace)) as batches:
                    steps = run.pace.watched(in_steps(batches, sampler.accum))
                    train_epoch(run.engine, steps, run.model.vision_encoder, progress, checkpoints, stop, constants)
            loss, answers = judge(run, valid, "Validating", asked)
            record, is_best = finish_epoch(progress, loss, answers, valid, time.monotonic() - clock)
            record.update(run.pace.figures(progress))
            log.epoch(record, progress.history[0], baseline, constants, run.pace)
            if is_best:
                checkpoints.save_best(progress)
            elif tests and not record["epoch"]:
                take_test(run, train, *tests)
            from_main(accelerator, output.write_lines, "training_log.jsonl", progress.history)
            accelerator.log(log.scores_of_epoch(record), progress.total_steps)
            if record["epoch"] and stop.check(checkpoints.is_due(constants.checkpoint_minutes)):
                checkpoints.save(progress)
    merged, is_to_test = None, tests and not progress.is_tested
    if progress.best_epoch and (constants.lora_rank or is_to_test):
        checkpoints.load_best()
        if constants.lora_rank:
            merged = adapters.merge(run.model, *run.engine[:2])  # the text model's weights
            log.merged(judge(run, valid, "Validating, adapters merged", ())[0], progress)
        if is_to_test:
            take_test(run, train, *tests)
            from_main(accelerator, checkpoints.save_test, progress)
    saved = merged, run.model, run.tokenizer, *run.datasets
    from_main(accelerator, finish, constants, progress, checkpoints, output, *saved)


def main():
    constants = cli.parse(sys.modules[__name__], sys.argv[1:])
    transformers.logging.set_verbosity_error()
    set_up_pillow()
    output = OutputDir(constants.output_dir)
    checkpoints = Checkpoints(output)
    accelerator = start(constants.tracker, output.path, constants.lora_rank)
    held = output.held(constants.model_id, constants.tracker) if accelerator.is_main_process else nullcontext()
    with one_speaks(accelerator), held, Stop(accelerator) as stop:
        from_main(accelerator, checkpoints.refuse_finished, constants.overwrite)
        try:
            fine_tune(constants, accelerator, output, checkpoints, stop)
        except Interrupted as interrupted:
            print(f"Stopped by {interrupted}. The same command goes on from there.")
            sys.exit(128 + interrupted.signum)
        end(accelerator)


if __name__ == "__main__":
    cli.run(main)
