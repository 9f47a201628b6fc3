"""A look at a run before a GPU is rented for it: its data, what it will take, and whether it would begin at all.

python -m moondream2.check --train_file mine.jsonl --batch_size 8

Constants and flags are those of finetune_moondream.py. Of the model, configuration and tokenizer are loaded, and no
weights; nothing is written but the index of the pictures that were looked at.
"""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import adapters, cli, log
from moondream2.checkpoints import Checkpoints
from moondream2.launch import refuse_missing_tracker
from moondream2.loading import choose_views
from moondream2.machine import row_multiple
from moondream2.output_dir import OutputDir
from moondream2.pictures import set_up_pillow
from moondream2.rows import StepSampler

GIB, GB = 2**30, 1e9
WEIGHT, TRAINED, CHECKPOINTED = 2, 8, 6  # bytes a parameter: frozen, in training, in a checkpoint
ADAPTER, CHECKPOINTED_ADAPTER = 16, 12  # the same of float32 adapters
NEVER_STOPPED = SimpleNamespace(check_alone=lambda: None)


def check(constants):
    """Prints what a run with these constants prints before it trains, and what it will take.

    Raises:
        InputError: the run would end with it.
    """
    refuse_missing_tracker(constants.tracker)
    adapters.refuse_or_warn(constants.lora_rank, constants.learning_rate)
    output = OutputDir(constants.output_dir)
    output.look(constants.model_id, constants.tracker)
    checkpoints = Checkpoints(output)
    checkpoints.refuse_finished(constants.overwrite, is_look=True)
    config, tokenizer = script.load_tokenizer(constants.model_id, constants.revision)
    choose_views(config, constants.model_id, constants.tiles)
    datasets = script.read_data(constants, config, tokenizer, NEVER_STOPPED)
    if checkpoints.newest() and not constants.overwrite:
        checkpoints.refuse_another_run(constants, cli.may_change(script), datasets)
        print(f"It would go on from {checkpoints.newest()}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.vision_encoder.requires_grad_(False)
    all_weights = WEIGHT * sum(p.numel() for p in model.parameters())
    text_weights = WEIGHT * sum(p.numel() for p in model.text_model.parameters())
    adapters.add(model, constants)
    log.parameters(model)

    most = most_positions(datasets[0], config, constants)
    trained = sum(p.numel() for p in model.text_model.parameters() if p.requires_grad)
    held = text_weights + ADAPTER * trained if constants.lora_rank else TRAINED * trained
    activations = activation_bytes(config.text_config, most, constants.gradient_checkpointing)
    print(
        f"On the card: {(held + activations) / GIB:,.1f} GiB by the arithmetic of docs/memory.md, "
        f"{held / GIB:,.1f} for weights, gradients and AdamW, {activations / GIB:,.1f} for activations"
    )
    # A checkpoint and its best epoch's weights, the best's since then, and the next one before the first is removed.
    kept = 2 * (CHECKPOINTED_ADAPTER + 4 if constants.lora_rank else CHECKPOINTED + WEIGHT) * trained
    for line in disk(constants, len({key for each in datasets for key in each.pictures}), config, kept, all_weights):
        print(line)
    print("A run with these constants would begin.")


def most_positions(train, config, constants):
    """Prints what steps and an epoch are made of on a card; returns the positions of the largest micro-batch."""
    order = constants.batch_size * constants.grad_accum_steps, constants.batch_size, constants.group_by_picture
    multiple = row_multiple(torch.device("cuda"))
    sampler = StepSampler(train, config.prefix_tokens, *order, constants.seed, multiple=multiple)
    log.step_size(sampler, constants.batch_size)
    positions = [sampler.work(batch) for step in sampler.epoch(1) for batch in step]
    total, a_question, most = sum(positions), sum(positions) / len(train), max(positions)
    print(f"An epoch has {total:,} positions, {a_question:,.0f} a question; a micro-batch {most:,} at most")
    return most


def activation_bytes(config, positions, is_checkpointed):
    """What the text model keeps of a micro-batch until its backward pass, in bfloat16.

    A layer keeps its input, its norm's output, queries, keys, values, attention's output and the MLP's inner values;
    with checkpointing its input alone, but for the one layer that is computed again.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    layer = 6 * width + config.intermediate_size
    return WEIGHT * positions * (layers * width + layer if is_checkpointed else layers * layer)


def disk(constants, pictures, config, kept, all_weights):
    """Lines on what a run takes of the disks, and where that is more than there is.

    Args:
        kept: bytes in OUTPUT_DIR while it runs.
        all_weights: bytes of the saved model.
    """
    needs = [(constants.output_dir, max(kept, all_weights), f", {all_weights / GB:,.1f} GB after it")]
    if constants.features_dir is not None:
        features = WEIGHT * pictures * config.image_tokens * config.text_config.hidden_size
        needs.insert(0, (constants.features_dir, features, ", less what lies there already"))
    for folder, need, more in needs:
        there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        fits = "" if need <= free else ": that does not fit"
        yield f"On the disk: up to {need / GB:,.1f} GB in {folder}{more}; {free / GB:,.1f} GB are free{fits}"


def main():
    constants = cli.parse(script, sys.argv[1:])
    transformers.logging.set_verbosity_error()
    set_up_pillow()
    check(constants)


if __name__ == "__main__":
    cli.run(main)
