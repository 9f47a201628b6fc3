"""The order of examples and how they are cut: each once an epoch, the same steps however they are shared out."""

import random
from collections import Counter
from itertools import combinations_with_replacement, pairwise
from typing import NamedTuple

import pytest

from moondream2.rows import StepSampler, text_tokens, whole_rows
from tests.shared import ROOT, dataset

PREFIX = 730  # BOS and a picture


class Example(NamedTuple):
    number: int
    picture: str
    prompt_ids: list
    answer_ids: list


DRAW = random.Random(7)
COUNTS = [1, 4, 9, 2, 2, 7, 1, 3, 12, 5]  # questions on each picture
PICTURES = [f"p{p}" for p, count in enumerate(COUNTS) for _ in range(count)]
DATA = [Example(i, p, [0] * DRAW.randint(3, 30), [0] * DRAW.randint(1, 9)) for i, p in enumerate(PICTURES)]


def sampler_of(data, *order):
    return StepSampler(data, PREFIX, *order)


def epoch(sampler, number=1, first_step=0):
    """The micro-batches of an epoch, each a list of rows of examples."""
    return [batch for step in sampler.epoch(number, first_step) for batch in step]


def numbers_of(batch):
    return [example.number for row in batch for example in row]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("batch_size", "accum", "processes"), [(1, 1, 1), (2, 1, 1), (8, 1, 1), (3, 2, 1), (2, 4, 3)])
def test_each_example_once_an_epoch(group, batch_size, accum, processes):
    size = batch_size * accum * processes
    samplers = [sampler_of(DATA, size, batch_size, group, 0, rank, processes) for rank in range(processes)]
    batches = [epoch(sampler) for sampler in samplers]
    assert Counter(i for each in batches for batch in each for i in numbers_of(batch)) == Counter(range(len(DATA)))
    assert all(len(batch) <= batch_size for each in batches for batch in each)
    assert {len(each) for each in batches} == {accum * samplers[0].steps}
    assert all(len(step) == accum for step in samplers[0].epoch(1))


def test_a_row_is_of_one_picture_which_lies_in_one_row_of_a_batch():
    """Unless its questions are too long for a row."""
    for batch in epoch(sampler_of(DATA, 16, 16, False, 0)):
        assert all(len({example.picture for example in row}) == 1 for row in batch)
        assert len({row[0].picture for row in batch}) == len(batch)


@pytest.mark.parametrize("group", [False, True])
def test_steps_do_not_depend_on_how_they_are_cut(group):
    def steps(batch_size, accum, processes):
        size = batch_size * accum * processes
        samplers = [sampler_of(DATA, size, batch_size, group, 3, rank, processes) for rank in range(processes)]
        steps = zip(*(sampler.epoch(1) for sampler in samplers), strict=True)
        return [sorted(i for mine in step for batch in mine for i in numbers_of(batch)) for step in steps]

    assert steps(12, 1, 1) == steps(3, 4, 1) == steps(1, 12, 1) == steps(2, 2, 3) == steps(4, 1, 3)


def test_epochs_and_seeds_differ_and_repeat():
    first, again, other_seed = (sampler_of(DATA, 4, 4, False, seed) for seed in (0, 0, 1))
    assert epoch(first, 1) == epoch(again, 1)
    assert epoch(first, 1) != epoch(first, 2)
    assert epoch(first, 1) != epoch(other_seed, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_going_on_in_an_epoch_gives_its_remaining_steps(processes):
    """Also to each process what it would have had: who has done most so far depends on the steps before."""
    for rank in range(processes):
        sampler = sampler_of(DATA, 4, 2 // processes, False, 0, rank, processes)
        assert epoch(sampler, 1, first_step=5) == epoch(sampler)[10:]


def test_grouping_keeps_a_pictures_questions_together():
    grouped, mixed = (epoch(sampler_of(DATA, 4, 4, group, 0)) for group in (True, False))
    assert sum(map(len, grouped)) < 0.6 * sum(map(len, mixed))
    order = [row[0].picture for batch in grouped for row in batch]
    assert order != sorted(order)


@pytest.mark.parametrize(("size", "torn"), [(2, 0), (3, 0.4), (4, 0.1), (8, 0.1), (16, 0.05)])
def test_grouped_examples_share_a_row_wherever_a_step_has_room_for_them(size, torn):
    """One picture with a single question among many with even numbers shifts none of them."""
    draw = random.Random(size)
    counts = [draw.choice([2, 4, 6, 8]) for _ in range(300)] + [1]
    data = [Example(0, f"p{p}", [0] * 5, [0] * 2) for p, count in enumerate(counts) for _ in range(count)]
    groups = sum(-(-count // size) for count in counts)
    steps = [
        {example.picture for batch in step for row in batch for example in row}
        for step in sampler_of(data, size, size, True, 0).epoch(1)
    ]
    assert groups <= sum(map(len, steps)) <= (1 + torn) * groups + 1
    assert len(steps) == -(-len(data) // size)
    pictures = [min(step) for step in steps]
    assert pictures != sorted(pictures) and len(set(pictures[:20])) > 10


def test_rows_are_cut_so_that_the_most_work_is_as_little_as_can_be():
    """Against all ways to cut the rows, by length, into so many batches."""
    for seed in range(20):
        sampler = sampler_of(DATA, 8, 2, True, seed, 0, 2)
        examples = random.Random(seed).sample(DATA, 8)
        cut = sampler.cut(examples)
        assert len(cut) == 4 and [sampler.work(batch) for batch in cut] == sorted(map(sampler.work, cut))
        assert sorted(i for batch in cut for i in numbers_of(batch)) == sorted(each.number for each in examples)
        rows = sorted((row for batch in cut for row in batch), key=sampler.length)
        ways = combinations_with_replacement(range(len(rows) + 1), 3)
        ways = [[rows[a:b] for a, b in pairwise([0, *way, len(rows)])] for way in ways]
        best = min(max(map(sampler.work, way)) for way in ways if max(map(len, way)) <= 2)
        assert max(map(sampler.work, cut)) == best


def test_the_work_is_even():
    """Rows, and positions with padding, of each process over an epoch, with 1 to 12 questions a picture."""
    data = uneven_data(pictures=2000)
    for group in (False, True):
        for processes in (2, 8):
            done = []
            for rank in range(processes):
                batches = epoch(sampler_of(data, 8 * processes, 8, group, 0, rank, processes))
                positions = sum(len(batch) * max(map(tokens_of, batch), default=0) for batch in batches)
                done.append((sum(map(len, batches)), positions + PREFIX * sum(map(len, batches))))
            rows, positions = zip(*done, strict=True)
            assert max(rows) < 1.05 * min(rows), (group, processes, done)
            assert max(positions) < 1.01 * min(positions), (group, processes, done)


@pytest.mark.parametrize("step_size", [2, 16])
def test_padded_rows_have_few_lengths(step_size):
    """Over an epoch of the sample data, at the prefix of the released model; what they take is what they are cut by."""
    train = dataset(ROOT / "train.jsonl").examples
    as_they_are, padded = (StepSampler(train, PREFIX, step_size, step_size, True, 0, 0, 1, m) for m in (1, 64))
    shapes = [
        {(len(batch), max(map(sampler.length, batch))) for batch in epoch(sampler)} for sampler in (as_they_are, padded)
    ]
    assert (len(shapes[0]), len(shapes[1])) == {2: (18, 1), 16: (9, 2)}[step_size]
    positions = [sum(map(sampler.work, epoch(sampler))) for sampler in (as_they_are, padded)]
    assert positions[0] < positions[1] < 1.09 * positions[0]
    for batch in epoch(padded):
        longest = PREFIX + max(map(tokens_of, batch))
        assert padded.work(batch) == len(batch) * next(n for n in range(0, 9999, 64) if n >= longest)


def uneven_data(pictures):
    draw = random.Random(3)
    return [
        Example(0, f"p{p}", [0] * draw.randint(8, 40), [0] * draw.randint(2, 12))
        for p in range(pictures)
        for _ in range(draw.choice([1, 1, 2, 4, 12]))
    ]


def tokens_of(row):
    return sum(map(text_tokens, row))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_micro_batch_takes_no_more_than_batch_size_pictures_with_a_question_each(batch_size):
    """However many questions there are on a picture, as far as accumulation brings them into one step."""
    data = [example for example in DATA for _ in range(20)]
    longest = max(map(text_tokens, data))
    for batch in epoch(sampler_of(data, batch_size * 32, batch_size, True, 0)):
        assert len(batch) * (PREFIX + max(map(tokens_of, batch), default=0)) <= batch_size * (PREFIX + longest)


@pytest.mark.parametrize("pictures", [1, 3, 100])
@pytest.mark.parametrize("tokens", [40, 100, 10_000])
def test_whole_rows_hold_each_example_once(pictures, tokens):
    examples = [example for example in DATA if example.number % 5]
    batches = whole_rows(examples, PREFIX, pictures, tokens)
    assert Counter(i for batch in batches for i in numbers_of(batch)) == Counter(each.number for each in examples)
    most = pictures * (PREFIX + max(map(text_tokens, examples)))
    for batch in batches:
        assert len({row[0].picture for row in batch}) == len(batch)
        assert len(batch) == 1 or len(batch) * (PREFIX + max(map(tokens_of, batch))) <= most
        assert max(map(tokens_of, batch)) <= tokens
    if tokens == 40:  # a question a row, which fill the batches, but the last of each manieth row of its picture
        sizes = [len(batch) for batch in batches]
        assert sum(size < pictures for size in sizes) <= max(Counter(each.picture for each in examples).values())
    if tokens == 10_000:
        assert len({row[0].picture for batch in batches for row in batch}) == sum(map(len, batches))
        longest = [max(map(tokens_of, batch)) for batch in batches]
        shortest = [min(map(tokens_of, batch)) for batch in batches]
        assert all(a <= b for a, b in zip(longest, shortest[1:], strict=False))  # of similar length together
