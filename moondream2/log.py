"""What a run says while it goes: lines on the terminal, the progress bar, and training_log.jsonl."""

import math
import sys

from tqdm import tqdm

from moondream2.cli import InputError
from moondream2.pace import in_words, larger_batch_size
from moondream2.summary import first, format_left_out
from moondream2.verdict import sentences

TOLERANCE = 1e-3  # of a loss: by how much rounding merged weights may change it unsaid
PACE = ("questions_per_second", "tokens_per_second", "share_of_peak", "peak_memory_gib")  # of an epoch's record
BAD_STEPS = 3  # steps in a row that could not be applied end a run


def skipped(dataset, since=0, most=5):
    """Prints how many lines of a dataset were left out after the first `since`, and the first of them."""
    lines = dataset.skipped[since:]
    if lines:
        print(f"{dataset.path}: {len(lines):,} of {len(dataset.skipped) + len(dataset.examples):,} lines skipped")
        print("\n".join(f"  {source}: {reason}" for source, reason in lines[:most]))


def held_out(train, held):
    """Prints which pictures were taken out of the training data to judge by: how many, and lines of the first."""
    sources = {}
    for example in held.examples:
        sources.setdefault(example.picture, example.source)
    pictures = f"{len(sources):,} of {len(sources) + len(train.pictures):,} pictures in {train.path}"
    print(f"No VALID_FILE: {pictures} judge each epoch, with {len(held):,} questions ({first(sources.values())})")


def parameters(model):
    """Prints the original run's line, which counts the region model; then what is really trained."""
    trained, held = (sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (model, model.text_model))
    print(f"Trainable parameters: {trained:,} of {sum(p.numel() for p in model.parameters()):,}")
    print(f"The optimizer holds {held:,}, the text model's")


def step_size(sampler, batch_size):
    """Prints what an optimizer step is made of, and what a larger BATCH_SIZE would save."""
    processes = f"{sampler.processes} process{'es' if sampler.processes > 1 else ''}"
    parts = f"{processes} x BATCH_SIZE {batch_size} x {sampler.accum} micro-batch{'es' if sampler.accum > 1 else ''}"
    print(f"An optimizer step takes {sampler.step_size} questions: {parts}; an epoch has {sampler.steps} steps")
    if sampler.rank == 0 and (found := larger_batch_size(sampler, batch_size)):
        larger, after, before = found
        print(
            f"With more of a picture's questions in a step, BATCH_SIZE {larger} would take {after:,.0f} positions an "
            f"epoch in place of {before:,.0f}, {before / after:.1f} times fewer; LEARNING_RATE may want to grow with it"
        )


def shown(batches, title, total, done, progress, is_shown, pace=None):
    """The batches, behind a progress bar that begins at `done`; says which examples fall out of them.

    Args:
        pace: of training, where there is one: the bar tells it.
    """
    options = {"unit": "", "leave": False, "mininterval": 0.5, "disable": not is_shown}
    with tqdm(batches, title, total, initial=done, **options) as bar:
        for batch in bar:
            left_out(progress, batch["failed"])
            yield batch
            if progress.tokens:
                told = [f"loss {progress.loss_sum / progress.tokens:.4f}", pace and pace.words(progress)]
                bar.set_postfix_str(", ".join(filter(None, told)), refresh=False)


def left_out(progress, failed):
    """Says which examples fell out because their picture disappeared or broke during the run, each once."""
    known = {source for source, _ in progress.left_out}
    for source, reason in failed:
        if source not in known:
            progress.left_out.append((source, reason))
            tqdm.write(f"left out {source}: {reason} ({len(progress.left_out)} so far)", sys.stderr)


def decoded(left_out, warnings):
    """Prints which lines are left out since their pictures can't be decoded, and what there is to say of others."""
    if told := format_left_out(left_out, warnings):
        print(told, flush=True)


def scores_of_step(step):
    """What a tracker is told of an optimizer step."""
    return {"train_loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate}


def bad_step(step, in_a_row, scaler=None):
    """Says why a step was not applied: its examples, or that they are gone.

    In float16 a gradient times the loss scale of `scaler` may be too large, which is then lowered: as long as that can
    help, such steps are no fault of the run.

    Raises:
        InputError: it is the last of a few in a row.
    """
    if not step.tokens:
        tqdm.write("Step not applied: none of its pictures can be read any more", sys.stderr)
        if in_a_row >= BAD_STEPS:
            raise InputError(
                f"{in_a_row} steps in a row without a picture that can be read: bring the pictures back, and the same "
                "command goes on"
            )
        return
    if scaler and math.isfinite(step.loss) and scaler.get_scale() >= 1:
        tqdm.write(f"Step not applied: the loss scale falls to {scaler.get_scale():g}", sys.stderr)
        return
    sources = ", ".join(example.source for batch in step.batches for row in batch["rows"] for example in row)
    tqdm.write(f"Step not applied: loss {step.loss}, gradient {step.grad_norm}; its examples: {sources}", sys.stderr)
    if in_a_row >= BAD_STEPS:
        raise InputError(
            f"{in_a_row} steps in a row without a finite loss and gradient, the last on {sources}: begin again with "
            f"--overwrite true and a lower LEARNING_RATE than {step.learning_rate:g}, or without these lines"
        )


def scores_of_epoch(record):
    """What a tracker is told of an epoch."""
    return {name: record[name] for name in ("valid_loss", "valid_accuracy", *PACE) if record.get(name) is not None}


def epoch(record, first, baseline, constants, pace):
    """Prints an epoch's losses and accuracy, beside that of the first record, before training, and the baseline.

    After the first one also which BATCH_SIZE the memory that it took leaves room for, where that is known.
    """
    name = f"Epoch {record['epoch']} of {constants.epochs}" if record["epoch"] else "Before training"
    parts = [f"Training Avg Loss: {decimals(record['train_loss'])}"] if record["epoch"] else []
    parts.append(f"Validation Avg Loss: {decimals(record['valid_loss'])}")
    if record["valid_accuracy"] is not None:
        start = f"before training {first['valid_accuracy']:.1%}, " if record["epoch"] else ""
        parts.append(f"Validation accuracy: {record['valid_accuracy']:.1%} ({start}baseline {baseline:.1%})")
    told = in_words(record)
    print(f"{name}: {', '.join(parts)}, {record['seconds']:.0f} s{told and f' ({told})'}", flush=True)
    if record["epoch"] == 1 and (found := pace.batch_size_that_fits(constants.batch_size)):
        fits, need, free = found
        more = "is the largest that surely fits" if fits == constants.batch_size else "would fit"
        print(f"BATCH_SIZE {fits} {more} on this card: {need / 2**30:.1f} of {free / 2**30:.1f} GiB, by this epoch's")


def test(record, first, baseline):
    """Prints what came of the test file, as `epoch` does of the validation; by itself, for it has no say."""
    name = f"with epoch {record['epoch']}'s weights" if record["epoch"] else "before training"
    start = f"before training {first['test_accuracy']:.1%}, " if record["epoch"] else ""
    scores = f"Test Avg Loss: {decimals(record['test_loss'])}, Test accuracy: {record['test_accuracy']:.1%}"
    print(f"Test file {name}: {scores} ({start}baseline {baseline:.1%})", flush=True)


def scores_of_test(record):
    """What a tracker is told of the test file."""
    return {name: record[name] for name in ("test_loss", "test_accuracy") if record[name] is not None}


def decimals(number):
    return "not finite" if number is None else f"{number:.4f}"


def best(progress, epochs):
    """Prints which epoch was kept, and what came after it."""
    losses = {each["epoch"]: each["valid_loss"] for each in progress.history if each["epoch"]}
    print(f"Best epoch: {progress.best_epoch} of {epochs} (Validation Avg Loss {losses[progress.best_epoch]:.4f})")
    after = [decimals(loss) for each, loss in losses.items() if each > progress.best_epoch]
    if after:
        print(f"What followed was worse and is not in the saved model: {', '.join(after)}")


def merged(loss, progress):
    """Prints the validation loss with the adapters merged, and warns where rounding has changed it."""
    apart = progress.history[progress.best_epoch]["valid_loss"]
    print(f"Adapters merged into the weights: Validation Avg Loss {loss:.4f}, {apart:.4f} apart", flush=True)
    if not abs(loss - apart) <= TOLERANCE * apart:
        words = f"the merged weights, rounded, have a validation loss of {loss:.4f} in place of {apart:.4f}"
        print(f"warning: {words}: adapter/ in OUTPUT_DIR is exact", file=sys.stderr)


def verdict(sets, names=None):
    """Prints what came of a set of answers: the change, the largest mistake, how far an answer can be trusted.

    Args:
        sets: [{"name", "predictions"}], as the report has them; of several the last, and of the others the change.
        names: {"before", "after"} where two models are compared.
    """
    for each in sets:
        told = sentences(each["predictions"], names)
        for sentence in told if each is sets[-1] else told[:1]:
            print(f"{each['name'].capitalize()}: {sentence}" if len(sets) > 1 else sentence)
