"""This project's AdamW against float32 and against two libraries': the losses they reach, their memory and their time.

`python -m tests.compare_optimizers runs` trains the sample data with the small checkpoint, by the script itself, over
five seeds at two learning rates. `python -m tests.compare_optimizers width` trains two layers of the released model's
width (or `--width 1024 --seeds 3`) for 500 steps. Both print a table; `--optimizers ours torchao` leaves others out.
Times are processor time: with OMP_NUM_THREADS=1, what one core would take that does nothing else.

The libraries are no requirement of the project: pip install torchao==0.18.0 torch-optimi==0.3.3
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw

import finetune_moondream as script
from moondream2 import optimizer as module
from moondream2.modeling_moondream2 import MoondreamTextConfig, TextModel
from moondream2.optimizer import AdamW, build_optimizer

SEEDS, RATES = range(5), (3e-5, 1e-4)
FIGURES = "bytes a parameter", "ms a step", "of which AdamW"
LAYERS, VOCABULARY, SEQUENCES, TOKENS, BATCH, STEPS, LAST = 2, 256, 64, 16, 4, 500, 20


class Mixed(torch.optim.Optimizer):
    """For a bfloat16 model: torch's AdamW on float32 weights that are kept beside it, as mixed precision does it."""

    def __init__(self, params, **settings):
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            settings = {name: group[name] for name in ("lr", "weight_decay", "eps")} | {
                "amsgrad": False,
                "maximize": False,
            }
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"weight": p.float(), "step": torch.zeros(())}
                    state |= {name: torch.zeros_like(state["weight"]) for name in ("exp_avg", "exp_avg_sq")}
                lists = [[p.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]]
                adamw([state["weight"]], *lists, fused=True, beta1=beta1, beta2=beta2, **settings)
                p.copy_(state["weight"])


def torchao(kind, *arguments, **settings):
    import torchao.optim

    class StochasticRounding(getattr(torchao.optim, kind)):
        """torchao keeps the rate in a tensor; the script's schedule and log take it as a number."""

        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, bf16_stochastic_round=True, **settings)
            for group in self.param_groups:
                group["lr"] = group["lr"].item()

        def step(self, closure=None):
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"])
            super().step()
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    if kind == "_AdamW":
        settings["amsgrad"] = False
    return StochasticRounding(*arguments, **settings)


def optimi(*arguments, **settings):
    from optimi import AdamW

    return AdamW(*arguments, kahan_sum=True, **settings)


def compiled(*arguments, **settings):
    """This project's, with the kernel that it has on a GPU."""
    with torch.no_grad():
        constants = *settings["betas"], settings["eps"]
        kernel = module.kernel(module.update_if_finite, torch.device("cpu"), torch.bfloat16, *constants)
    module.update_on = lambda *arguments: kernel
    return AdamW(*arguments, **settings)


OPTIMIZERS = {
    "float32": partial(torch.optim.AdamW, fused=True),
    "mixed": Mixed,
    "ours": AdamW,
    "ours-compiled": compiled,
    "torchao": partial(torchao, "_AdamW"),
    "torchao-8bit": partial(torchao, "AdamW8bit"),
    "optimi": optimi,
    "bfloat16": torch.optim.AdamW,
}


class Meter:
    """Builds the optimizer of that name as the script's `build_optimizer` does; measures its steps and its memory."""

    def __init__(self, name):
        self.name, self.started, self.ended, self.bytes = name, [], [], None

    def build(self, model, learning_rate, weight_decay, betas):
        model.to(torch.float32 if self.name == "float32" else torch.bfloat16)
        groups = build_optimizer(model, learning_rate, weight_decay, betas).param_groups
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        optimizer = OPTIMIZERS[self.name](groups, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=1e-8)
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        return optimizer

    def before(self, optimizer, *_):
        self.started.append(time.process_time())
        if not getattr(optimizer, "_step_supports_amp_scaling", False) and hasattr(optimizer, "grad_scale"):
            for group in optimizer.param_groups:
                torch._foreach_div_([p.grad for p in group["params"]], optimizer.grad_scale)

    def after(self, optimizer, *_):
        self.ended.append(time.process_time())
        if self.bytes is None:
            self.bytes = bytes_a_parameter(optimizer)

    def result(self):
        """Seconds are medians: the first steps compile, and between two epochs lies a validation."""
        return {
            "bytes": self.bytes,
            "step": statistics.median(b - a for a, b in zip(self.ended, self.ended[1:], strict=False)),
            "update": statistics.median(b - a for a, b in zip(self.started, self.ended, strict=True)),
        }


def bytes_a_parameter(optimizer):
    """Of weights, gradients and all that the optimizer keeps from step to step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [each for p in parameters for each in optimizer.state[p].values() if isinstance(each, torch.Tensor)]
    tensors = [*parameters, *(p.grad for p in parameters), *states]
    return sum(map(size, tensors)) / sum(p.numel() for p in parameters)


def size(tensor):
    """A tensor's bytes; those of its parts where it is made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def whole_run(name, rate, seed):
    """The script's run, in a process of its own: the best epoch's validation loss."""
    meter = Meter(name)
    script.build_optimizer = meter.build
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w") as said:
        flags = {"model_id": "tests/tiny_moondream2", "learning_rate": rate, "seed": seed}
        flags |= {"output_dir": f"{folder}/out", "features_dir": f"{folder}/features"}
        sys.argv[1:] = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            script.main()
        records = map(json.loads, (Path(folder) / "out" / "training_log.jsonl").read_text().splitlines())
        return {"loss": min(record["valid_loss"] for record in records if record["epoch"]), **meter.result()}


def compare_runs(names):
    """Mean ± standard deviation over the seeds, of the loss and of its difference from float32's with the same seed."""
    names = list(dict.fromkeys(["float32", *names]))
    results = in_processes(whole_run, [(name, rate, seed) for seed in SEEDS for rate in RATES for name in names])
    heads = [head for rate in RATES for head in (f"loss at rate {rate:g}", "against float32")]
    print_row("AdamW", *heads, *FIGURES)
    print_row(*["---"] * (1 + len(heads) + len(FIGURES)))
    for name in names:
        cells = []
        for rate in RATES:
            losses, exact = ([results[each, rate, seed]["loss"] for seed in SEEDS] for each in (name, "float32"))
            cells.append(f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}")
            differences = [a - b for a, b in zip(losses, exact, strict=True)]
            cells.append(f"{statistics.mean(differences):+.4f} ± {statistics.stdev(differences):.4f}")
        print_row(name, *cells, *figures([result for task, result in results.items() if task[0] == name]))


def width_run(name, width, seed, steps=STEPS):
    """Two layers learn random sequences by heart: the mean training loss of the last steps."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    model = TextModel(MoondreamTextConfig(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, **sizes))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    sequences = torch.randint(VOCABULARY, (SEQUENCES, TOKENS))
    order = torch.cat([torch.randperm(SEQUENCES) for _ in range(-(-steps * BATCH // SEQUENCES))])
    meter, losses = Meter(name), []
    optimizer = meter.build(model, RATES[0], script.WEIGHT_DECAY, script.BETAS)
    for rows in order.split(BATCH)[:steps]:
        batch = sequences[rows]
        logits = model(input_ids=batch).logits.float()  # (batch, tokens, vocabulary)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), script.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"loss": statistics.mean(losses[-LAST:]), **meter.result()}


def compare_width(names, width, seeds):
    results = in_processes(width_run, [(name, width, seed) for seed in range(seeds) for name in names])
    heads = [f"training loss, seed {seed}" for seed in range(seeds)]
    print_row("AdamW", *heads, *FIGURES)
    print_row(*["---"] * (1 + len(heads) + len(FIGURES)))
    for name in names:
        measured = [result for task, result in results.items() if task[0] == name]
        print_row(name, *(f"{result['loss']:.4f}" for result in measured), *figures(measured))


def in_processes(function, tasks):
    """{task: result}, one after the other, each in a process of its own; told as they come."""
    results = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), max_tasks_per_child=1) as pool:
        for task, result in zip(tasks, pool.map(function, *zip(*tasks, strict=True)), strict=True):
            results[task] = result
            print(*task, result, file=sys.stderr, flush=True)
    return results


def figures(results):
    """The cells below FIGURES."""
    milliseconds = (1000 * statistics.median(result[key] for result in results) for key in ("step", "update"))
    return f"{results[0]['bytes']:.2f}", *(f"{each:.0f}" if each >= 10 else f"{each:.1f}" for each in milliseconds)


def print_row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("runs", "width"))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=1, help="of the two layers' weights and sequences")
    arguments = parser.parse_args()
    if arguments.what == "runs":
        compare_runs(arguments.optimizers)
    else:
        compare_width(arguments.optimizers, arguments.width, arguments.seeds)


if __name__ == "__main__":
    main()
