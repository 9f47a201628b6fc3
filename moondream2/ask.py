"""Asks a saved model about a picture, or scores it on a whole file of questions, without training.

python -m moondream2.ask moondream_crosswalks_finetuned images/valid_001.jpg "Is there a crossing?" "Is a car waiting?"
python -m moondream2.ask moondream_crosswalks_finetuned valid.jsonl
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import transformers
from accelerate import Accelerator

import finetune_moondream as script
from moondream2.card import machine, predictions
from moondream2.checkpoints import Progress
from moondream2.cli import InputError, run
from moondream2.features import FeatureStore
from moondream2.files import write_text
from moondream2.loading import load_model, load_tokenizer
from moondream2.modeling_moondream2 import preprocess
from moondream2.pictures import PictureError, open_picture
from moondream2.report import write_report


def ask(model, tokenizer, path, questions):
    """Prints the answers to questions about one picture."""
    encoder = model.vision_encoder
    try:
        pixels, _ = open_picture(Path(path), lambda image: preprocess(image, encoder.image_size, encoder.tile_from))
    except PictureError as error:
        raise InputError(f"cannot use the picture {path}: {error}") from None
    for answer in model.answer_questions(model.encode_image([pixels]), [questions], tokenizer)[0]:
        print(answer)


def score(accelerator, model_id, model, tokenizer, path, batch_size, output_dir):
    """Prints accuracy and loss on a file of questions; writes the answers and a report into a folder."""
    data = script.VQADataset(path)
    room = model.config.text_config.max_position_embeddings - 1 - model.config.image_tokens
    data.tokenize(tokenizer, room)
    script.print_skipped(data)
    store = FeatureStore(None, model.vision_encoder, (model.config.image_tokens, model.config.text_config.hidden_size))
    scored = SimpleNamespace(
        constants=SimpleNamespace(batch_size=batch_size, valid_file=path, valid_answers=len(data), seed=0),
        accelerator=accelerator,
        device=accelerator.device,
        model=model,
        tokenizer=tokenizer,
        valid=data,
        room=room,
        store=store,
        collate=script.Collator(model, tokenizer, store, data.pictures),
        progress=Progress({}),
        stop=SimpleNamespace(check=lambda: None),
    )
    loss, scored.progress.answers_best = script.evaluate(scored)
    accuracy = script.accuracy(data, scored.progress.answers_best)
    scored.progress.history = [{"epoch": 0, "valid_loss": loss, "valid_accuracy": accuracy, "seconds": 0.0}]
    print(f"{len(data)} questions: Avg Loss: {loss:.4f}, accuracy: {accuracy:.1%}")
    answers = predictions(scored)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "predictions.jsonl", "".join(json.dumps(each) + "\n" for each in answers))
    report = {
        "title": f"{Path(model_id).name} on {Path(path).name}",
        "model": {"id": model_id, "revision": None},
        "history": scored.progress.history,
        "kept_epoch": None,
        "data": None,
        "predictions": answers,
        "constants": {"BATCH_SIZE": batch_size},
        "machine": machine(scored),
    }
    write_report(output_dir / "report.html", report)
    print(f"Answers and report in {output_dir}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="the folder of a saved model")
    parser.add_argument("picture", help="a picture, or a JSONL file of pictures, questions and answers")
    parser.add_argument("question", nargs="*", help="questions about the picture")
    parser.add_argument("--batch_size", type=int, default=2, help="as the script's: less takes less memory")
    parser.add_argument("--output_dir", help="for a file's answers and report; default: valid_scored, of valid.jsonl")
    words = parser.parse_args()
    is_file = words.picture.endswith(".jsonl")
    if is_file == bool(words.question):
        raise InputError("give a picture and at least one question, or a .jsonl file alone")
    transformers.utils.logging.set_verbosity_error()
    _, tokenizer = load_tokenizer(words.model, script.REVISION)
    accelerator = Accelerator()
    model = load_model(words.model, script.REVISION).to(accelerator.device)
    if is_file:
        output_dir = Path(words.output_dir or Path(words.picture).with_suffix("").name + "_scored")
        score(accelerator, words.model, model, tokenizer, words.picture, words.batch_size, output_dir)
    else:
        ask(model, tokenizer, words.picture, words.question)


if __name__ == "__main__":
    run(main)
