"""What stands beside a saved model: how to ask it, its card, its answers, and the machine it was made on."""

import os
import resource
import sys
from pathlib import Path

import torch
import transformers

from moondream2.scoring import is_correct


def how_to_ask(folder, example):
    """Three lines of Python that load the saved model and ask it an example's question."""
    return (
        "from PIL import Image; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = (kind.from_pretrained({str(folder)!r}, trust_remote_code=True)"
        " for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        f"print(model.answer_question(model.encode_image(Image.open({str(example.image_path)!r})),"
        f" {example.question!r}, tokenizer))"
    )


def number(value, form):
    return "-" if value is None else format(value, form)


def model_card(run):
    """README.md of the saved model, in the hub's form."""
    constants, progress = run.constants, run.progress
    rows = [
        f"| {each['epoch']} | {number(each['train_loss'], '.4f')} | {each['valid_loss']:.4f} | "
        f"{number(each['valid_accuracy'], '.1%')} |"
        for each in progress.history
    ]
    base = constants.model_id + ("" if Path(constants.model_id).is_dir() else f" at revision {constants.revision}")
    data = "".join(
        f"- {name}: {len(dataset)} examples on {len(dataset.pictures)} pictures\n"
        for name, dataset in ((constants.train_file, run.train), (constants.valid_file, run.valid))
    )
    return (
        f"---\nbase_model: vikhyatk/moondream2\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        f"# {run.output_dir.name}\n\n{base}, fine-tuned with its vision encoder frozen.\n\n## Ask it\n\n"
        f"```python\n{how_to_ask(constants.output_dir, run.valid[0])}\n```\n\n## Data\n\n{data}\n## Losses\n\n"
        "| epoch | Training Avg Loss | Validation Avg Loss | Validation accuracy |\n| --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + f"\n\nThe weights are those of epoch {progress.best_epoch}. Epoch 0 is the model before training.\n\n"
        + "## Constants\n\n```\n"
        + "\n".join(f"{name.upper()} = {value!r}" for name, value in vars(constants).items())
        + "\n```\n"
    )


def predictions(run):
    """One dictionary for each validation example that was asked: what was expected, answered before and after."""
    before, after = run.progress.answers_before, run.progress.answers_best
    return [
        {
            "place": example.place,
            "image_path": example.image_path,
            "file": str(run.valid.pictures[example.picture].path),
            "question": example.question,
            "answer": example.answer,
            "before": before.get(example.place),
            "after": after[example.place],
            "before_correct": is_correct(before[example.place], example.answer) if example.place in before else None,
            "after_correct": is_correct(after[example.place], example.answer),
        }
        for example in run.valid.examples
        if example.place in after
    ]


def report_of(run, answers):
    """What the report shows of a run, as plain data."""
    constants = run.constants
    return {
        "title": run.output_dir.name,
        "model": {"id": constants.model_id, "revision": constants.revision},
        "history": run.progress.history,
        "kept_epoch": run.progress.best_epoch,
        "data": run.data,
        "predictions": answers,
        "constants": {name.upper(): value for name, value in vars(constants).items()},
        "machine": machine(run),
    }


def machine(run):
    """Versions, device, time and memory of this run."""
    is_cuda = run.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if is_cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if is_cuda else f"{run.device.type}, {os.cpu_count()} cores",
        "seconds": round(sum(each["seconds"] for each in run.progress.history), 1),
        "peak_memory_gib": round(peak / 2**30, 2),
    }
