"""Which examples go through the model together: rows of one picture's questions, and micro-batches of rows."""

import random
from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import islice

from moondream2.modeling_moondream2 import lay_out_rows, row_mask
from moondream2.pictures import PictureError


def text_tokens(example):
    """How many tokens an example's prompt and answer have."""
    return len(example.prompt_ids) + len(example.answer_ids)


def row_length(row, prefix):
    """The positions of a row: `prefix` for BOS and the picture, then those of its examples' texts."""
    return prefix + sum(map(text_tokens, row))


def rows_of(examples, max_text_tokens):
    """The examples as rows, one a picture, or several where its texts have more than `max_text_tokens` tokens."""
    pictures = defaultdict(list)
    for example in examples:
        pictures[example.picture].append(example)
    rows = []
    for group in pictures.values():
        length = max_text_tokens + 1
        for example in group:
            length += text_tokens(example)
            if length > max_text_tokens:
                rows.append([])
                length = text_tokens(example)
            rows[-1].append(example)
    return rows


class StepSampler:
    """The micro-batches of one process, each a list of rows of examples: each example once an epoch.

    The order depends on seed and epoch alone. An optimizer step takes the next `step_size` examples of it, however
    they are cut into micro-batches and shared among processes; the last step of an epoch takes what is left.
    """

    def __init__(self, dataset, prefix, step_size, batch_size, group_by_picture, seed, rank=0, processes=1, multiple=1):
        self.dataset, self.prefix, self.step_size = dataset, prefix, step_size
        self.group_by_picture, self.seed = group_by_picture, seed
        self.rank, self.processes, self.multiple = rank, processes, multiple
        # A row takes no more positions than BATCH_SIZE pictures with a question each.
        self.max_text_tokens = batch_size * (prefix + max(map(text_tokens, dataset))) - prefix
        self.accum = -(-step_size // (batch_size * processes))
        self.steps = -(-len(dataset) // step_size)

    def epoch(self, number, first_step=0):
        """The epoch's steps from `first_step` on, each a list of `accum` micro-batches, of which some may be empty."""
        order, done = self.order(number), [0] * self.processes
        for step in range(self.steps):
            batches, mine = self.step(order, step), []
            for start in range(0, len(batches), self.processes):
                # Who has done most so far gets what is least, here and over the epoch.
                ranks = sorted(range(self.processes), key=done.__getitem__, reverse=True)
                for rank, batch in zip(ranks, batches[start : start + self.processes], strict=True):
                    done[rank] += self.work(batch)
                    if rank == self.rank:
                        mine.append(batch)
            if step >= first_step:
                yield mine

    def step(self, order, number):
        """The micro-batches of a step of an epoch in that order, for all processes."""
        numbers = order[number * self.step_size : (number + 1) * self.step_size]
        return self.cut([self.dataset[i] for i in sorted(numbers)])

    def with_batch_size(self, batch_size):
        """The same with another BATCH_SIZE, steps having as many micro-batches."""
        order = batch_size * self.accum * self.processes, batch_size, self.group_by_picture, self.seed
        return StepSampler(self.dataset, self.prefix, *order, self.rank, self.processes, self.multiple)

    def order(self, epoch):
        """The numbers of all examples, shuffled: one by one, or in groups on one picture that fit into a step."""
        draw = random.Random(f"{self.seed} {epoch}")
        numbers = list(range(len(self.dataset)))
        draw.shuffle(numbers)
        if not self.group_by_picture:
            return numbers
        pictures = defaultdict(list)
        for i in numbers:
            pictures[self.dataset[i].picture].append(i)
        groups = [
            group[start : start + self.step_size]
            for group in pictures.values()
            for start in range(0, len(group), self.step_size)
        ]
        draw.shuffle(groups)
        steps = [group for group in groups if len(group) == self.step_size]
        others = put_together([group for group in groups if len(group) < self.step_size], self.step_size)
        last = others.pop() if others and len(others[-1]) < self.step_size else []
        if others:
            steps += others
            draw.shuffle(steps)
        return [i for step in [*steps, last] for i in step]

    def cut(self, examples):
        """A step's rows, as micro-batches for all processes, from the least work to the most.

        Rows of similar length lie together, and the micro-batch with the most work has as little as can be.
        """
        parts = self.accum * self.processes
        most = -(-len(examples) // parts)  # rows; BATCH_SIZE but in an epoch's last step
        rows = sorted(rows_of(examples, self.max_text_tokens), key=self.length, reverse=True)

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
        """The positions that a row takes, padded to a multiple: they cost as much as others."""
        return -(-row_length(row, self.prefix) // self.multiple) * self.multiple

    def work(self, batch):
        """The positions of a micro-batch, padding included."""
        return len(batch) * max(map(self.length, batch), default=0)


def in_steps(batches, accum):
    """Lists of the micro-batches that make up an optimizer step each."""
    while step := list(islice(batches, accum)):
        yield step


def put_together(groups, size):
    """Steps of `size` numbers each, but for the last, made of smaller groups, of which few are torn.

    Were they taken as they come, a picture with an odd number of questions would shift all that follow it, so that each
    of their steps had rows of two pictures.
    """
    left, steps = defaultdict(list), []
    for group in groups:
        left[len(group)].append(group)
    while left:
        step = []
        while left and len(step) < size:
            room = size - len(step)
            length = max((length for length in left if length <= room), default=min(left))
            group = left[length].pop()
            if not left[length]:
                del left[length]
            step += group[:room]
            if length > room:
                left[length - room].append(group[room:])
        steps.append(step)
    return steps


def whole_rows(examples, prefix, pictures, max_text_tokens):
    """Batches of rows, each row all examples of a picture; rows of similar length together.

    A batch takes no more positions than `pictures` pictures with a question each, but a row of its own may. A picture
    whose examples have more than `max_text_tokens` tokens takes several rows, in different batches.
    """
    most = pictures * (prefix + max(map(text_tokens, examples)))
    parts = defaultdict(list)  # the first rows of all pictures, then the second ones, and so on
    seen = Counter()
    for row in rows_of(examples, max_text_tokens):
        parts[seen[row[0].picture]].append(row)
        seen[row[0].picture] += 1
    batches = []
    for part in parts.values():
        batches.append([])
        for row in sorted(part, key=lambda row: row_length(row, prefix)):
            if batches[-1] and (len(batches[-1]) + 1) * row_length(row, prefix) > most:
                batches.append([])
            batches[-1].append(row)
    return batches


def lay_out(rows, pictures, store, bos, image_tokens, multiple=1):
    """A micro-batch of rows with what the store has of their pictures; safe to call from several threads.

    Returns:
        what `lay_out_rows` returns, and: `rows`, those whose picture can be read; `pictures`, what `store.read` gives
        for each; `failed`, a list of (source, reason) of the examples left out.
    """
    readable, reads, failed = [], [], []
    for row in rows:
        try:
            reads.append(store.read(pictures[row[0].picture]))
            readable.append(row)
        except PictureError as error:
            failed += [(example.source, error.reason(example.image_path)) for example in row]
    texts = [[(example.prompt_ids, example.answer_ids) for example in row] for row in readable]
    # Where nothing can be read, one position without a picture keeps this process in step with the others.
    layout = lay_out_rows(texts, bos, image_tokens, multiple) if texts else lay_out_rows([[]], bos, 0)
    return {**store.pinned(layout), "rows": readable, "pictures": reads, "failed": failed}


def text_inputs(batch, device):
    """What the text model takes of a micro-batch, on the device."""
    names = ("input_ids", "position_ids", "answer_positions")
    inputs = {name: batch[name].to(device, non_blocking=True) for name in names}
    # Rows of one question need no mask: no token looks at the padding behind it.
    if any(len(row) > 1 for row in batch["rows"]):
        documents = batch["document_ids"].to(device, non_blocking=True)
        image_tokens = documents.shape[1] - batch["input_ids"].shape[1]
        inputs["attention_mask"] = row_mask(documents, 1 + image_tokens)
    return inputs
