"""Which examples go through the model together, and how they are laid out in rows, one for each picture."""

import random
from bisect import bisect_left
from collections import Counter, defaultdict

import torch
from torch.nn import functional as F

from moondream2.modeling_moondream2 import lay_out_rows
from moondream2.pictures import PictureError, pixels_of

PREFIX = 730  # positions of a row before its first question: what a row costs at least


def text_tokens(example):
    return len(example.prompt_ids) + len(example.answer_ids)


def row_length(dataset, row):
    return PREFIX + sum(text_tokens(dataset[i]) for i in row)


def by_picture(dataset, numbers):
    """{picture: the example numbers on it}, both in the order of `numbers`."""
    groups = defaultdict(list)
    for i in numbers:
        groups[dataset[i].picture].append(i)
    return groups


def rows_of(dataset, numbers, tokens):
    """The examples `numbers` as rows, one a picture, or several where its examples have more than `tokens` tokens."""
    rows = []
    for group in by_picture(dataset, numbers).values():
        length = tokens + 1
        for i in group:
            length += text_tokens(dataset[i])
            if length > tokens:
                rows.append([])
                length = text_tokens(dataset[i])
            rows[-1].append(i)
    return rows


class StepSampler:
    """The micro-batches of one process, as lists of example numbers: each example once an epoch.

    The order depends on seed and epoch alone. An optimizer step takes the next `step_size` examples of it, however
    they are cut into micro-batches and shared among processes; the last step of an epoch takes what is left.
    """

    def __init__(self, dataset, step_size, batch_size, group_by_picture, seed, rank=0, processes=1):
        self.dataset, self.step_size, self.group_by_picture, self.seed = dataset, step_size, group_by_picture, seed
        self.rank, self.processes = rank, processes
        # A row takes no more positions than BATCH_SIZE pictures with a question each.
        self.row_tokens = batch_size * (PREFIX + max(map(text_tokens, dataset))) - PREFIX
        self.accum = -(-step_size // (batch_size * processes))
        self.steps = -(-len(dataset) // step_size)
        self.epoch, self.first_step = 0, 0  # set before each epoch

    def __len__(self):
        return (self.steps - self.first_step) * self.accum

    def __iter__(self):
        order, done = self.order(), [0] * self.processes
        for step in range(self.steps):
            batches = self.cut(order[step * self.step_size : (step + 1) * self.step_size])
            for start in range(0, len(batches), self.processes):
                # Who has done most so far gets what is least, here and over the epoch.
                ranks = sorted(range(self.processes), key=done.__getitem__, reverse=True)
                for rank, batch in zip(ranks, batches[start : start + self.processes], strict=True):
                    done[rank] += self.work(batch)
                    if rank == self.rank and step >= self.first_step:
                        yield [i for row in batch for i in row]

    def order(self):
        """All example numbers, shuffled: one by one, or in groups on one picture that fit into a step."""
        draw = random.Random(f"{self.seed} {self.epoch}")
        numbers = list(range(len(self.dataset)))
        draw.shuffle(numbers)
        if not self.group_by_picture:
            return numbers
        groups = [
            group[start : start + self.step_size]
            for group in by_picture(self.dataset, numbers).values()
            for start in range(0, len(group), self.step_size)
        ]
        draw.shuffle(groups)
        return [i for group in groups for i in group]

    def cut(self, numbers):
        """A step's rows, as micro-batches for all processes, from the least work to the most.

        Rows of similar length lie together, and the micro-batch with the most work has as little as can be.
        """
        parts = self.accum * self.processes
        most = -(-len(numbers) // parts)  # rows; BATCH_SIZE but in an epoch's last step
        rows = sorted(rows_of(self.dataset, sorted(numbers), self.row_tokens), key=self.length, reverse=True)

        def batches(size):
            cut, start = [], 0
            while start < len(rows):
                end = start + min(most, max(1, size // self.length(rows[start])))
                cut.append(rows[start:end])
                start = end
            return cut

        sizes = range(most * self.length(rows[0]) + 1)
        least = bisect_left(sizes, True, key=lambda size: len(batches(size)) <= parts)
        cut = sorted(batches(least), key=self.work)
        return [[]] * (parts - len(cut)) + cut

    def length(self, row):
        return row_length(self.dataset, row)

    def work(self, batch):
        """The positions of a micro-batch, padding included."""
        return len(batch) * max(map(self.length, batch), default=0)


def whole_rows(dataset, numbers, pictures, tokens):
    """Batches of rows, each all of a picture's examples among `numbers`; of similar length together.

    A batch takes no more positions than `pictures` pictures with a question each, but a row of its own may. A picture
    whose examples have more than `tokens` tokens takes several rows, in different batches.
    """
    most = pictures * (PREFIX + max(text_tokens(dataset[i]) for i in numbers))
    parts = defaultdict(list)  # how manieth row of its picture -> its rows
    of_picture = Counter()
    for row in rows_of(dataset, numbers, tokens):
        picture = dataset[row[0]].picture
        parts[of_picture[picture]].append(row)
        of_picture[picture] += 1
    batches = []
    for part in parts.values():
        in_batch = 0
        for row in sorted(part, key=lambda row: row_length(dataset, row)):
            in_batch += 1
            if in_batch == 1 or in_batch * row_length(dataset, row) > most:
                batches.append([])
                in_batch = 1
            batches[-1] += row
    return batches


class Collator:
    """Lays a micro-batch of examples out in rows, one for each picture, and brings its features or its pixels.

    Returns a dictionary: `input_ids`, `segments`, `position_ids` of `lay_out_rows`; `labels` (rows, tokens), -100
    but on answers; `scored` (n,), the flat positions that predict an answer token; `pictures`, for each row (Picture,
    features or pixels); `examples`, for each row a list; `failed`, a list of (place, reason) left out.
    """

    def __init__(self, model, tokenizer, store, pictures):
        self.bos, self.image_tokens = tokenizer.bos_token_id, model.config.image_tokens
        self.image_size, self.tile_from = model.vision_encoder.image_size, model.vision_encoder.tile_from
        self.store, self.pictures = store, pictures

    def __call__(self, examples):
        rows, pictures, failed = [], [], []
        for key, numbers in by_picture(examples, range(len(examples))).items():
            row = [examples[i] for i in numbers]
            try:
                features = self.store.load(key)
                features = pixels_of(self.pictures[key], self) if features is None else features
            except PictureError as error:
                failed += [(example.place, f"picture broken: {example.image_path}: {error}") for example in row]
            else:
                rows.append(row)
                pictures.append((self.pictures[key], features))
        return {**self.lay_out(rows), "pictures": pictures, "examples": rows, "failed": failed}

    def lay_out(self, rows):
        if not rows:  # one position, on which nothing is trained
            layout = lay_out_rows([[]], self.bos, image_tokens=0)
            nothing = torch.empty(0, dtype=torch.long)
            return {**layout, "labels": torch.full_like(layout["segments"], -100), "scored": nothing}
        texts = [[example.prompt_ids + example.answer_ids for example in row] for row in rows]
        layout = lay_out_rows(texts, self.bos, self.image_tokens)
        labels = torch.full_like(layout["segments"], -100)
        for r, row in enumerate(rows):
            end = 1 + self.image_tokens
            for example in row:
                start, end = end + len(example.prompt_ids), end + len(example.prompt_ids) + len(example.answer_ids)
                labels[r, start:end] = torch.tensor(example.answer_ids)
        scored = (F.pad(labels[:, 1:], (0, 1), value=-100).flatten() != -100).nonzero()[:, 0]
        return {**layout, "labels": labels, "scored": scored}
