"""How fast a run trains: what that is of the card, what is left of the run, and which BATCH_SIZE the memory holds."""

import re
import time

import torch

SAMPLED = 500  # steps of an epoch that are looked at to tell what another BATCH_SIZE would take
WORTH_TELLING = 0.9  # of the positions: a larger BATCH_SIZE that leaves more of them saves little
USABLE = 0.9  # of a card's memory, as blocks of many sizes leave holes
PEAKS = {  # 10^12 operations a second in bfloat16, summed in float32, without sparsity: NVIDIA's data sheets
    r"NVIDIA (H100 80GB HBM3|H200|GH200 \w+)": 989,
    r"NVIDIA H100 NVL": 835,
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA A[18]00(-SXM4-\d0GB|-PCIE-\d0GB| \d0GB PCIe)": 312,
    r"NVIDIA L40S": 362,
    r"NVIDIA L40": 181,
    r"NVIDIA L4": 121,
    r"NVIDIA A40": 150,
    r"NVIDIA A30": 165,
    r"NVIDIA A10": 125,
    r"NVIDIA RTX 6000 Ada Generation": 364,
    r"NVIDIA RTX A6000": 155,
    r"NVIDIA GeForce RTX 5090": 210,
    r"NVIDIA GeForce RTX 4090": 165,
    r"NVIDIA GeForce RTX 3090": 71,
}


def peak_rate(name):
    """Operations a second that a card of that name does at most in bfloat16; None of one that is not known."""
    return next((1e12 * peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


def operations(config, batch, is_all_trained=True):
    """Of a forward and a backward pass over a batch's rows, 2 for each multiply-add.

    Counted is what the loss needs, padding and what is computed again left out: attention to earlier positions, and of
    the last layer's MLP, its projection and `lm_head` the positions that predict an answer token. The backward pass
    takes twice as much as the forward pass; as much, where few weights are trained.
    """
    lengths, scored = (batch["document_ids"] >= 0).sum(1), len(batch["targets"])
    tokens, pairs = lengths.sum().item(), lengths.square().sum().item()
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    seen = 3 * tokens * width**2 + pairs * width  # Wqkv, and attention: half of two products of n x n
    behind = width**2 + 2 * width * inner  # out_proj and the MLP
    total = layers * seen + ((layers - 1) * tokens + scored) * behind + scored * width * config.vocab_size
    return (6 if is_all_trained else 4) * total


class Pace:
    """What training takes, watched from beside it: of the epoch under way, or what this process has done of it."""

    def __init__(self, text_model, accelerator, sampler, epochs):
        self.config, self.sampler, self.epochs = text_model.config, sampler, epochs
        self.is_all_trained = all(p.requires_grad for p in text_model.parameters())
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.seconds_a_step = None
        self.begin()

    def begin(self):
        self.steps = self.questions = self.positions = self.operations = self.largest = self.training_peak = 0
        self.seconds = 0.0

    def watched(self, steps):
        """The steps of an epoch, lists of micro-batches, each counted once the next is asked for."""
        self.begin()
        before = self.peak_memory()
        started = time.monotonic()
        for batches in steps:
            yield batches
            self.steps += 1
            self.take_time(started)
            for batch in batches:
                self.count(batch)
        if self.steps and self.device.type == "cuda":  # the last one may still be under way
            torch.cuda.synchronize(self.device)
            self.take_time(started)
        peak = self.peak_memory()
        self.training_peak = peak if peak > before else 0  # what came before training may have taken more

    def take_time(self, started):
        self.seconds = time.monotonic() - started
        self.seconds_a_step = self.seconds / self.steps

    def count(self, batch):
        if batch["rows"]:
            self.questions += sum(map(len, batch["rows"]))
            self.positions += (batch["document_ids"] >= 0).sum().item()
            self.operations += operations(self.config, batch, self.is_all_trained)
            self.largest = max(self.largest, batch["document_ids"].numel())

    def peak_memory(self):
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def figures(self, progress):
        """What is known of the epoch's training: {name: number}, for log and trackers.

        The processes share the work evenly: what this one did stands for each of them. A token is a position of the
        text model, a picture's 729 among them, padding not.
        """
        if not self.seconds:
            return {}
        told = {
            "questions_per_second": self.processes * self.questions / self.seconds,
            "tokens_per_second": self.processes * self.positions / self.seconds,
            "seconds_left": self.seconds_left(progress),
        }
        if self.device.type == "cuda":
            if peak := peak_rate(torch.cuda.get_device_name(self.device)):
                told["share_of_peak"] = self.operations / self.seconds / peak
            told["peak_memory_gib"] = self.peak_memory() / 2**30
        return {name: round(value, 4) for name, value in told.items()}

    def seconds_left(self, progress):
        """Until the last epoch is judged, at the pace so far; a test file's answers are not in it."""
        epochs_left = self.epochs - progress.epoch
        steps_left = epochs_left * self.sampler.steps + self.sampler.steps - progress.step
        judging = progress.history[0]["seconds"] if progress.history else 0
        return max(0, steps_left) * self.seconds_a_step + max(0, epochs_left + 1) * judging

    def words(self, progress):
        """The figures as the progress bar has them."""
        return in_words(self.figures(progress))

    def batch_size_that_fits(self, batch_size):
        """(BATCH_SIZE, bytes that it would take, bytes that there are), by what the epoch took; None where unknown.

        It is `batch_size`, doubled as often as its largest micro-batch fits. All that the epoch took besides weights
        and optimizer is taken to grow with the positions, gradients too: it may be less.
        """
        if not self.largest or self.device.type != "cuda" or not self.training_peak:
            return None
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        at_rest = torch.cuda.memory_allocated(self.device)
        a_position = (self.training_peak - at_rest) / self.largest

        def taken(size):
            works = micro_batches(self.sampler.with_batch_size(size))
            return at_rest + a_position * max(map(max, works))

        most = len(self.sampler.dataset)
        while 2 * batch_size <= most and taken(2 * batch_size) <= USABLE * free:
            batch_size *= 2
        return batch_size, taken(batch_size), free


def micro_batches(sampler):
    """For each of some steps the positions of its micro-batches, over all processes; one step at a time."""
    order = sampler.order(1)
    for step in range(min(sampler.steps, SAMPLED)):
        yield [sampler.work(batch) for batch in sampler.step(order, step)]


def positions_of_an_epoch(sampler):
    """Of all rows, from some of its steps; exact where it has no more than these."""
    some = min(sampler.steps, SAMPLED)
    seen = min(some * sampler.step_size, len(sampler.dataset))
    return sum(map(sum, micro_batches(sampler))) * len(sampler.dataset) / seen


def larger_batch_size(sampler, batch_size):
    """(BATCH_SIZE, its positions of an epoch, those of `batch_size`), the largest that is worth it; None if none is."""
    before = now = positions_of_an_epoch(sampler)
    best = batch_size
    while 2 * best <= len(sampler.dataset):
        after = positions_of_an_epoch(sampler.with_batch_size(2 * best))
        if after > WORTH_TELLING * now:
            break
        best, now = 2 * best, after
    return None if best == batch_size else (best, now, before)


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def in_words(figures):
    """Of `Pace.figures`, those that there are: "3.1 questions/s, 2,400 tokens/s, 41% of the card's peak, …"."""
    forms = {
        "questions_per_second": lambda value: f"{value:,.3g} questions/s",
        "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
        "share_of_peak": lambda value: f"{value:.0%} of the card's peak rate",
        "peak_memory_gib": lambda value: f"{value:.1f} GiB at most",
        "seconds_left": lambda value: f"{duration(value)} of the run left",
    }
    return ", ".join(form(figures[name]) for name, form in forms.items() if figures.get(name))
