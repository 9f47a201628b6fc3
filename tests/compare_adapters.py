"""A run with LORA_RANK against one of every weight: the validation losses that the small checkpoint reaches.

`python -m tests.compare_adapters` trains it by the script itself, on the sample data and on their first 32 lines, each
way at three learning rates, then at the best of them over five seeds. It prints a table. A third way stands between
the two: of every weight, only the matrices that adapters sit on move. It says what is due to a low rank, and what to
all that adapters leave as it is.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path

import finetune_moondream as script
from tests.compare_optimizers import in_processes, print_row
from tests.shared import ROOT

SEEDS = range(5)  # the first of which chooses the rate
EVERY, THEIRS, ADAPTERS = "every weight", "the adapters' matrices, whole", "adapters"
RATES = {EVERY: (1e-4, 3e-4, 1e-3), THEIRS: (3e-4, 1e-3, 3e-3), ADAPTERS: (5e-4, 1e-3, 3e-3)}
EPOCHS = {None: 5, 32: 20}  # by the lines that are trained on, None: all 256


def whole_run(way, lines, rate, seed, rank):
    """The script's run, in a process of its own: the validation loss of each epoch."""
    if way == THEIRS:
        load_model = script.load_model
        script.load_model = lambda *release: only_matrices(load_model(*release))
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w") as said:
        with (ROOT / "train.jsonl").open(encoding="utf-8") as file:
            records = [json.loads(line) for line in islice(file, lines)]
        train = Path(folder) / "train.jsonl"
        for record in records:
            record["image_path"] = str(ROOT / record["image_path"])
        train.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = {"model_id": "tests/tiny_moondream2", "train_file": train, "learning_rate": rate, "seed": seed}
        flags |= {"epochs": EPOCHS[lines], "valid_answers": 0, "lora_rank": rank if way == ADAPTERS else None}
        flags |= {"output_dir": f"{folder}/out"}
        sys.argv[1:] = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            script.main()
        records = map(json.loads, (Path(folder) / "out" / "training_log.jsonl").read_text().splitlines())
        return [record["valid_loss"] for record in records if record["epoch"]]


def only_matrices(model):
    """The model, of whose weights only the matrices that adapters would sit on are to be trained."""
    for name, parameter in model.text_model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in model.text_model.adapter_targets and parameter.dim() > 1)
    return model


def compare(lines, rank):
    """Prints a row for each way: the rate with the lowest loss, and what it comes to over the seeds."""
    for way, rates in RATES.items():
        first = in_processes(whole_run, [(way, lines, rate, SEEDS[0], rank) for rate in rates])
        best = min(rates, key=lambda rate: min(first[way, lines, rate, SEEDS[0], rank]))
        more = in_processes(whole_run, [(way, lines, best, seed, rank) for seed in SEEDS[1:]])
        runs = [first[way, lines, best, SEEDS[0], rank], *more.values()]
        losses = ", ".join(f"{min(first[way, lines, rate, SEEDS[0], rank]):.4f}" for rate in rates)
        lowest, last = [min(run) for run in runs], [run[-1] for run in runs]
        epochs = statistics.median(run.index(min(run)) + 1 for run in runs)
        print_row(
            str(lines or "all 256"),
            way,
            f"{', '.join(f'{rate:g}' for rate in rates)}: {losses}",
            f"{statistics.mean(lowest):.4f} ± {statistics.stdev(lowest):.4f}",
            f"{epochs:g} of {EPOCHS[lines]}",
            f"{statistics.mean(last):.4f} ± {statistics.stdev(last):.4f}",
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora_rank", type=int, default=16)
    arguments = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["peft", "tests.compare_adapters"])
    heads = "training lines", "trained", "rates: losses at seed 0", "best epoch's loss", "epoch", "last epoch's loss"
    print_row(*heads)
    print_row(*["---"] * len(heads))
    for lines in EPOCHS:
        compare(lines, arguments.lora_rank)


if __name__ == "__main__":
    main()
