"""Asks a saved model about a picture, or scores it on a whole file of questions, alone or against another model.

With --serve, a page in the browser asks it.

python -m moondream2.ask moondream_crosswalks_finetuned images/valid_001.jpg "Is there a crossing?" "Is a car waiting?"
python -m moondream2.ask moondream_crosswalks_finetuned valid.jsonl
python -m moondream2.ask second_round valid.jsonl --against moondream_crosswalks_finetuned
python -m moondream2.ask moondream_crosswalks_finetuned --serve
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from moondream2 import cli, log
from moondream2.cli import InputError
from moondream2.data import Example, read_lines, tokenize
from moondream2.evaluation import evaluate
from moondream2.features import FeatureStore, chunks_with, encode_pictures
from moondream2.loading import checked_loading
from moondream2.machine import lacks_bfloat16, row_multiple, set_up_torch
from moondream2.output_dir import OutputDir
from moondream2.pictures import (
    KnownPictures,
    PictureError,
    examine,
    find_pictures,
    look,
    nearest,
    read_ahead,
    set_up_pillow,
)
from moondream2.report import facts, machine, means_of, predictions, write_report
from moondream2.rows import lay_out, whole_rows
from moondream2.scoring import METRICS
from moondream2.serve import LOCAL, PORT, serve
from moondream2.verdict import sureness


def load_tokenizer(folder):
    """A saved model's configuration and tokenizer."""
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder}: give that of a saved model, a run's OUTPUT_DIR")
    with checked_loading(folder, None) as loaded:
        loaded.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loaded.tokenizer = loaded.config.load_tokenizer(folder)
    return loaded.config, loaded.tokenizer


def load(folder, dtype=torch.bfloat16):
    """A saved model and its tokenizer."""
    config, tokenizer = load_tokenizer(folder)
    set_up_torch()
    with checked_loading(folder, None) as loaded:
        model, loaded.info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    return model, tokenizer


def ask(model, tokenizer, path, questions):
    """Prints the answers to questions about one picture, and on stderr what is to be said of it and how sure they are.

    So what a program reads is the answers alone.
    """
    try:
        pixels, remarks = examine(look(Path(path)), model.vision_encoder.preprocess)
    except PictureError as error:
        raise InputError(f"cannot use the picture {path}: {error}") from None
    for remark in remarks:
        print(f"warning: {remark}: {path}", file=sys.stderr)
    embeds = model.encode_image([pixels])
    for answer in model.answer_questions(embeds, [questions], tokenizer, return_probabilities=True)[0]:
        print(answer.text, flush=True)
        cut = ", of what there is: it was cut off" if answer.is_cut else ""
        print(f"  {sureness(answer.probability)} sure{cut}", file=sys.stderr, flush=True)


def read_questions(path, releases):
    """The examples of a JSONL file, in the form of a dataset: path, examples, pictures by their key, skipped.

    An example without answers is a question that is asked, and has no say in accuracy and loss.

    Args:
        releases: (config, tokenizer) of each model that is to be asked. What is too long for one, none is asked.
    """
    lines = read_lines(path, releases[0][1].eos_token, is_labelled=False)
    data = SimpleNamespace(path=path, examples=[], pictures={}, skipped=[])
    found = find_pictures(path, lines, KnownPictures(None))
    too_long = {}  # {source: its tokens}
    for config, tokenizer in releases:
        for line, ids in zip(lines, tokenize(lines, config, tokenizer), strict=True):
            if (tokens := sum(map(len, ids))) > config.max_text_tokens:
                too_long[line.source] = tokens
    for line in lines:
        picture = found[line.image_path]
        if line.lacks and not line.is_only_asked:
            data.skipped.append((line.source, line.lacks))
        elif isinstance(picture, PictureError):
            data.skipped.append((line.source, picture.reason(line.image_path)))
        elif line.source in too_long:
            data.skipped.append((line.source, f"too long: {too_long[line.source]} tokens of text"))
        else:
            data.pictures.setdefault(picture.key, picture)
            data.examples.append(Example(*line, picture.key, [], []))
    if not data.examples:
        raise InputError(f"{path} has no question that can be asked")
    return data


def in_tokens(examples, config, tokenizer):
    """The examples with the token ids of a model's release."""
    ids = tokenize(examples, config, tokenizer)
    return [each._replace(prompt_ids=p, answer_ids=a) for each, (p, a) in zip(examples, ids, strict=True)]


def answers_of(model, tokenizer, data, batch_size, features_dir=None):
    """What a model makes of a file's examples.

    Args:
        features_dir: where the pictures' features are kept for the next model; None keeps none.
    Returns:
        Avg Loss of those that have an answer, None without any; {key: Answer} of all; (source, reason) of those whose
        picture can't be decoded.
    """
    config, store, bos = model.config, FeatureStore(features_dir, model), tokenizer.bos_token_id
    if features_dir:
        encode_once(list(data.pictures.values()), model.vision_encoder, store)
    tokens = {"bos": bos, "image_tokens": config.image_tokens, "multiple": row_multiple(model.device)}
    read = partial(lay_out, pictures=data.pictures, store=store, **tokens)
    told = SimpleNamespace(left_out=[], tokens=0)

    def asked(examples):
        """Avg Loss and {key: Answer} of these examples."""
        rows = whole_rows(examples, config.prefix_tokens, 4 * batch_size, config.max_text_tokens)
        batches = log.shown(read_ahead(read, rows), "Asking", len(rows), 0, told, is_shown=True)
        return evaluate(model, tokenizer, batches, {example.key for example in examples})

    scored = [example for example in data.examples if example.answers]
    others = [example for example in data.examples if not example.answers]
    answers = asked(others)[1] if others else {}
    loss, given = asked(scored) if scored else (None, {})
    return loss, answers | given, told.left_out


def encode_once(pictures, vision_encoder, store):
    """Encodes the pictures for all models that have this encoder, as have those that were fine-tuned from one."""
    missing = [picture for picture in pictures if picture.key not in store]
    if missing and store.has_room(len(missing), show=False):
        encode_pictures(chunks_with(missing, [pictures]), vision_encoder, store)


def score(models, names, data, batch_size):
    """Answers a file's questions, scores those that have an answer, and prints what came of it.

    Args:
        models: gives (model, tokenizer) of one model or of two, each loaded when it is its turn. Of two the second is
            compared with the first, whose answers stand where those before training would.
        names: of the models.
        data: of `read_questions`.
    Returns:
        the answers, a dictionary a question, and the facts of their page.
    """
    results = []
    with TemporaryDirectory() as folder:
        for model, tokenizer in models:
            data.examples = in_tokens(data.examples, model.config, tokenizer)
            results.append(answers_of(model, tokenizer, data, batch_size, folder if len(names) > 1 else None))
            told = machine(model.device, 0.0)
            del model, tokenizer  # before the next are loaded
    before, (loss, after, left_out) = results[0][1] if len(results) > 1 else {}, results[-1]
    lines = predictions(data, before, after)
    sets, compared = [{"name": data.path.name, "predictions": lines}], None
    if len(names) > 1:
        compared = dict(zip(("before", "after"), names, strict=True))
    print_scores(lines, names, [each_loss for each_loss, _, _ in results])
    log.verdict(sets, compared)
    title = f"{' and '.join(names)} on {data.path.name}"
    return lines, facts(
        title=title,
        constants=SimpleNamespace(model_id=title, revision=None, batch_size=batch_size),
        summary=None,
        history=[{"epoch": 0, "valid_loss": loss, "valid_accuracy": means_of(lines)["correct"][1], "seconds": 0.0}],
        kept_epoch=None,
        sets=sets,
        skipped=data.skipped,
        left_out=left_out,
        machine=told,
        names=compared,
    )


def refuse_folder(output, model):
    """Raises InputError where the folder that is to take answers is a model's or a run's, or has a user's files."""
    output.look(model)
    if output.names - {"predictions.jsonl", "report.html"}:
        raise InputError(f"{output.path} is a run's: give another --output_dir")


def print_scores(lines, names, losses):
    """Prints each model's Avg Loss and metrics, where there are questions that have an answer."""
    scored = [each for each in lines if each["answers"]]
    if len(scored) < len(lines):
        print(f"{len(lines) - len(scored)} questions have no answer to compare with")
    for i, (name, loss) in enumerate(
        zip(names, losses, strict=True), start=-len(names)
    ):  # the last stands under "after"
        if scored:
            scores = ", ".join(f"{METRICS[metric].name}: {means[i]:.1%}" for metric, means in means_of(lines).items())
            print(f"{f'{name}: ' if len(names) > 1 else ''}{len(scored)} questions: Avg Loss: {loss:.4f}, {scores}")


def names_of(folders):
    """What to call the models in these folders: the folders' own names, or their paths where these are the same."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def load_in_turn(folders, device):
    """Each model with its tokenizer, loaded when it is asked for; in float16 where a card lacks bfloat16."""
    for folder in folders:
        model, tokenizer = load(folder, torch.float16 if lacks_bfloat16(device) else torch.bfloat16)
        yield model.to(device), tokenizer
        del model, tokenizer


def read_words():
    """What was typed, checked; `is_file` where a file of questions is to be scored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="the folder of a saved model")
    parser.add_argument(
        "picture", nargs="?", help="a picture, or a JSONL file of pictures, questions and, to be scored, answers"
    )
    parser.add_argument("question", nargs="*", help="questions about the picture")
    parser.add_argument("--against", metavar="MODEL", help="the folder of another model to compare it with, on a file")
    parser.add_argument("--batch_size", type=int, default=2, help="as the script's: less takes less memory")
    parser.add_argument("--output_dir", help="for a file's answers and report; default: valid_scored or valid_compared")
    parser.add_argument("--serve", action="store_true", help="opens a page that takes pictures and questions")
    parser.add_argument("--host", default=LOCAL[0], help="of the page; default: %(default)s, this computer alone")
    parser.add_argument("--port", type=int, default=PORT, help="of the page; default: %(default)s; 0: any")
    words = parser.parse_args()
    if words.serve and (words.picture or words.against):
        raise InputError("--serve takes a model alone: pictures and questions come from its page")
    kind = Path(words.picture or "").suffix.lower()
    words.is_file = kind == ".jsonl"
    if kind in (".json", ".csv", ".tsv", ".parquet", ".txt"):
        raise InputError(f"{words.picture} is neither a picture nor a .jsonl file: see python -m moondream2.convert")
    if words.is_file == bool(words.question) and not words.serve:
        raise InputError("give a picture and at least one question, a .jsonl file alone, or --serve")
    if words.against and not words.is_file:
        raise InputError("--against compares two models on a .jsonl file")
    if words.picture and not (path := Path(words.picture)).exists():  # said before a model is loaded for it
        near = nearest(path.parent, path.name)
        raise InputError(f"there is no {path}" + (f"; nearest is {path.parent / near}" if near else ""))
    return words


def main():
    words = read_words()
    transformers.utils.logging.set_verbosity_error()
    set_up_pillow()
    folders = [words.against, words.model] if words.against else [words.model]
    names, models = names_of(folders), load_in_turn(folders, Accelerator().device)
    if words.serve:
        serve(partial(next, models), names[0], words.host, words.port)
    elif words.is_file:
        kind = "compared" if words.against else "scored"
        output = OutputDir(words.output_dir or f"{Path(words.picture).with_suffix('').name}_{kind}")
        refuse_folder(output, words.model)
        data = read_questions(Path(words.picture), [load_tokenizer(folder) for folder in folders])
        log.skipped(data)
        lines, page = score(models, names, data, words.batch_size)
        with output.held(words.model):
            refuse_folder(output, words.model)  # once more: a run may have begun there
            output.write_lines("predictions.jsonl", lines)
            write_report(output.own("report.html"), page)
        print(f"Answers and report in {output.path}")
    else:
        ask(*next(models), words.picture, words.question)


if __name__ == "__main__":
    cli.run(main)
