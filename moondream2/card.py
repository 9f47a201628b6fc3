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


def model_card(constants, progress, train, valid, test=None) -> str:
    """README.md of the saved model, in the hub's form."""
    base = constants.model_id + ("" if Path(constants.model_id).is_dir() else f" at revision {constants.revision}")
    datasets = [train, valid, *([test] if test else [])]
    parts = {
        "Ask it": f"```python\n{how_to_ask(constants.output_dir, valid)}\n```",
        "Data": "\n".join(
            f"- {dataset.path}: {len(dataset.examples)} examples on {len(dataset.pictures)} pictures"
            for dataset in datasets
        ),
        "Left out": "\n".join(
            f"- {printable(lines['reason'])}, {lines['when']}: {printable(counted(lines))}"
            for lines in left_out_by_reason([line for each in datasets for line in each.skipped], progress.left_out)
        ),
        "Losses": f"{losses(progress.history)}\n\n"
        f"The weights are those of epoch {progress.best_epoch}. Epoch 0 is the model before training.",
        "Test": test and figures_of_test(test, progress),
        "Constants": "\n".join(
            ["```", *(f"{name.upper()} = {value!r}" for name, value in vars(constants).items()), "```"]
        ),
    }
    # No pipeline_tag: the hub would make a line of it that transformers' pipelines do not run.
    head = "---\nbase_model: vikhyatk/moondream2\nlibrary_name: transformers\nlicense: apache-2.0\n---"
    opening = f"# {Path(constants.output_dir).name}\n\n{base}, fine-tuned with its vision encoder frozen."
    if not constants.tiles:
        opening += " Pictures are seen in one view, without tiles, as llama.cpp and Ollama see them."
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


def figures_of_test(test, progress):
    """What the model says of the file that had no say in training."""
    rows = [
        f"| {when} | {decimals(record['test_loss'])} | {percent(record['test_accuracy'])} |"
        for when, record in (("before", progress.history[0]), ("after", progress.history[progress.best_epoch]))
    ]
    head = ["| training | Test Avg Loss | Test accuracy |", "| --- | --- | --- |"]
    said = (
        f"{test.path} had no say in training: its figures are what to expect on other pictures. Those of the "
        "validation tend to look better than they are, as the epoch was chosen by them."
    )
    return "\n".join([said, "", *head, *rows])
