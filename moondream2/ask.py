"""Asks a saved model about a picture, or scores it on a whole file of questions, without training.

python -m moondream2.ask moondream_crosswalks_finetuned images/valid_001.jpg "Is there a crossing?" "Is a car waiting?"
python -m moondream2.ask moondream_crosswalks_finetuned valid.jsonl
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from moondream2 import cli, log
from moondream2.cli import InputError
from moondream2.data import Example, read_lines, tokenize
from moondream2.evaluation import evaluate
from moondream2.features import FeatureStore
from moondream2.files import write_text
from moondream2.loading import checked_loading
from moondream2.pictures import KnownPictures, PictureError, examine, find_pictures, look, read_ahead, set_up_pillow
from moondream2.report import facts, machine, means_of, predictions, write_report
from moondream2.rows import lay_out, whole_rows
from moondream2.scoring import METRICS


def load(folder):
    """A saved model in bfloat16, and its tokenizer."""
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder}: give that of a saved model, a run's OUTPUT_DIR")
    with checked_loading(folder, None) as loaded:
        loaded.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, loaded.info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, trust_remote_code=False, output_loading_info=True
        )
        loaded.config = model.config
    return model, loaded.tokenizer


def ask(model, tokenizer, path, questions):
    """Prints the answers to questions about one picture, and on stderr what is to be said of it."""
    try:
        pixels, remarks = examine(look(Path(path)), model.vision_encoder.preprocess)
    except PictureError as error:
        raise InputError(f"cannot use the picture {path}: {error}") from None
    for remark in remarks:
        print(f"warning: {remark}: {path}", file=sys.stderr)
    for answer in model.answer_questions(model.encode_image([pixels]), [questions], tokenizer)[0]:
        print(answer)


def read_questions(path, tokenizer, max_text_tokens):
    """The examples of a JSONL file, in the form of a dataset: path, examples, pictures by their key, skipped.

    An example without answers is a question that is asked, and has no say in accuracy and loss.
    """
    lines = read_lines(path, tokenizer.eos_token, is_labelled=False)
    data = SimpleNamespace(path=path, examples=[], pictures={}, skipped=[])
    found = find_pictures(path, lines, KnownPictures(None))
    for line, (prompt_ids, answer_ids) in zip(lines, tokenize(lines, tokenizer), strict=True):
        picture = found[line.image_path]
        if line.lacks and not line.is_only_asked:
            data.skipped.append((line.source, line.lacks))
        elif isinstance(picture, PictureError):
            data.skipped.append((line.source, picture.reason(line.image_path)))
        elif len(prompt_ids) + len(answer_ids) > max_text_tokens:
            data.skipped.append((line.source, f"too long: {len(prompt_ids) + len(answer_ids)} tokens of text"))
        else:
            data.pictures.setdefault(picture.key, picture)
            data.examples.append(Example(*line, picture.key, prompt_ids, answer_ids))
    if not data.examples:
        raise InputError(f"{path} has no question that can be asked")
    return data


def score(model, tokenizer, path, batch_size, output_dir, title):
    """Answers a file of questions and scores those that have an answer; writes the answers and a report to a folder."""
    prefix, most = 1 + model.config.image_tokens, model.config.text_config.max_position_embeddings
    data = read_questions(path, tokenizer, most - prefix)
    log.skipped(data)
    store, bos = FeatureStore(None, model), tokenizer.bos_token_id
    read = partial(lay_out, pictures=data.pictures, store=store, bos=bos, image_tokens=model.config.image_tokens)

    def asked(examples):
        """Avg Loss and {key: Answer} of these examples."""
        rows = whole_rows(examples, prefix, 4 * batch_size, most - prefix)
        batches = tqdm(read_ahead(read, rows), "Asking", len(rows), unit=" batches", leave=False)
        return evaluate(model, tokenizer, batches, {example.key for example in examples})

    scored = [example for example in data.examples if example.answers]
    others = [example for example in data.examples if not example.answers]
    answers, history = asked(others)[1] if others else {}, []
    if others:
        print(f"{len(others)} questions have no answer to compare with")
    if scored:
        loss, given = asked(scored)
        answers |= given
    lines = predictions(data, before={}, after=answers)
    if scored:
        scores = {name: score for name, (_, score) in means_of(lines).items()}
        told = ", ".join(f"{METRICS[name].name}: {score:.1%}" for name, score in scores.items())
        print(f"{len(scored)} questions: Avg Loss: {loss:.4f}, {told}")
        history = [{"epoch": 0, "valid_loss": loss, "valid_accuracy": scores["correct"], "seconds": 0.0}]
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "predictions.jsonl", "".join(json.dumps(each) + "\n" for each in lines))
    page = facts(
        title=title,
        constants=SimpleNamespace(model_id=title, revision=None, batch_size=batch_size),
        summary=None,
        history=history,
        kept_epoch=None,
        sets=[{"name": path.name, "predictions": lines}],
        skipped=data.skipped,
        left_out=[],
        machine=machine(model.device, 0.0),
    )
    write_report(output_dir / "report.html", page)
    print(f"Answers and report in {output_dir}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="the folder of a saved model")
    parser.add_argument("picture", help="a picture, or a JSONL file of pictures, questions and, to be scored, answers")
    parser.add_argument("question", nargs="*", help="questions about the picture")
    parser.add_argument("--batch_size", type=int, default=2, help="as the script's: less takes less memory")
    parser.add_argument("--output_dir", help="for a file's answers and report; default: valid_scored, of valid.jsonl")
    words = parser.parse_args()
    kind = Path(words.picture).suffix.lower()
    is_file = kind == ".jsonl"
    if kind in (".json", ".csv", ".tsv", ".parquet", ".txt"):
        raise InputError(f"{words.picture} is neither a picture nor a .jsonl file: see python -m moondream2.convert")
    if is_file == bool(words.question):
        raise InputError("give a picture and at least one question, or a .jsonl file alone")
    transformers.utils.logging.set_verbosity_error()
    set_up_pillow()
    model, tokenizer = load(words.model)
    model.to(Accelerator().device)
    if is_file:
        output_dir = Path(words.output_dir or Path(words.picture).with_suffix("").name + "_scored")
        title = f"{Path(words.model).name} on {Path(words.picture).name}"
        score(model, tokenizer, Path(words.picture), words.batch_size, output_dir, title)
    else:
        ask(model, tokenizer, words.picture, words.question)


if __name__ == "__main__":
    cli.run(main)
