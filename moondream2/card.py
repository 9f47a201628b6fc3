"""The model card that stands beside a saved model, with the lines of Python that ask it."""

from pathlib import Path

from moondream2.report import decimals, percent
from moondream2.summary import counted, left_out_by_reason, printable


def how_to_ask(folder, dataset) -> str:
    """Three lines of Python that load the saved model and ask it a dataset's first question."""
    example = dataset.examples[0]
    picture = str(dataset.pictures[example.picture].path)
    return (
        "from PIL import Image; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = (kind.from_pretrained({str(folder)!r}, trust_remote_code=True)"
        " for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        f"print(model.answer_question(model.encode_image(Image.open({picture!r})),"
        f" {example.question!r}, tokenizer))"
    )


def model_card(constants, progress, train, valid) -> str:
    """README.md of the saved model, in the hub's form."""
    base = constants.model_id + ("" if Path(constants.model_id).is_dir() else f" at revision {constants.revision}")
    files = ((constants.train_file, train), (constants.valid_file, valid))
    parts = {
        "Ask it": f"```python\n{how_to_ask(constants.output_dir, valid)}\n```",
        "Data": "\n".join(
            f"- {name}: {len(dataset.examples)} examples on {len(dataset.pictures)} pictures" for name, dataset in files
        ),
        "Left out": "\n".join(
            f"- {printable(lines['reason'])}, {lines['when']}: {printable(counted(lines))}"
            for lines in left_out_by_reason([*train.skipped, *valid.skipped], progress.left_out)
        ),
        "Losses": f"{losses(progress.history)}\n\n"
        f"The weights are those of epoch {progress.best_epoch}. Epoch 0 is the model before training.",
        "Constants": "\n".join(
            ["```", *(f"{name.upper()} = {value!r}" for name, value in vars(constants).items()), "```"]
        ),
    }
    # No pipeline_tag: the hub would make a line of it that transformers' pipelines do not run.
    head = "---\nbase_model: vikhyatk/moondream2\nlibrary_name: transformers\nlicense: apache-2.0\n---"
    opening = f"# {Path(constants.output_dir).name}\n\n{base}, fine-tuned with its vision encoder frozen."
    return "\n\n".join([head, opening, *(f"## {name}\n\n{text}" for name, text in parts.items() if text)]) + "\n"


def losses(history):
    """The table of epochs."""
    rows = [
        f"| {record['epoch']} | {decimals(record['train_loss'])} | {decimals(record['valid_loss'])} | "
        f"{percent(record['valid_accuracy'])} |"
        for record in history
    ]
    head = "| epoch | Training Avg Loss | Validation Avg Loss | Validation accuracy |"
    return "\n".join([head, "| --- | --- | --- | --- |", *rows])
