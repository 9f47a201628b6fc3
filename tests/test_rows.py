"""The order of examples and how they are cut: each once an epoch, the same steps however they are shared out."""

import random
from collections import Counter
from itertools import combinations_with_replacement, pairwise
from types import SimpleNamespace

import pytest

from moondream2.rows import PREFIX, StepSampler, whole_rows

DRAW = random.Random(7)
COUNTS = [1, 4, 9, 2, 2, 7, 1, 3, 12, 5]  # questions on each picture
DATA = [
    SimpleNamespace(picture=f"p{p}", prompt_ids=[0] * DRAW.randint(3, 30), answer_ids=[0] * DRAW.randint(1, 9))
    for p, count in enumerate(COUNTS)
    for _ in range(count)
]


def epoch(sampler, number=1):
    sampler.epoch = number
    return list(sampler)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("batch_size", "accum", "processes"), [(1, 1, 1), (2, 1, 1), (8, 1, 1), (3, 2, 1), (2, 4, 3)])
def test_each_example_once_an_epoch(group, batch_size, accum, processes):
    size = batch_size * accum * processes
    samplers = [StepSampler(DATA, size, batch_size, group, 0, rank, processes) for rank in range(processes)]
    batches = [epoch(sampler) for sampler in samplers]
    assert Counter(i for each in batches for batch in each for i in batch) == Counter(range(len(DATA)))
    assert all(len({DATA[i].picture for i in batch}) <= batch_size for each in batches for batch in each)
    assert {len(each) for each in batches} == {len(sampler) for sampler in samplers} == {accum * samplers[0].steps}


@pytest.mark.parametrize("group", [False, True])
def test_steps_do_not_depend_on_how_they_are_cut(group):
    def steps(batch_size, accum, processes):
        size = batch_size * accum * processes
        samplers = [StepSampler(DATA, size, batch_size, group, 3, rank, processes) for rank in range(processes)]
        batches = [epoch(sampler) for sampler in samplers]
        return [
            sorted(i for each in batches for batch in each[step * accum : (step + 1) * accum] for i in batch)
            for step in range(samplers[0].steps)
        ]

    assert steps(12, 1, 1) == steps(3, 4, 1) == steps(1, 12, 1) == steps(2, 2, 3) == steps(4, 1, 3)


def test_epochs_and_seeds_differ_and_repeat():
    first, again, other_seed = (StepSampler(DATA, 4, 4, False, seed) for seed in (0, 0, 1))
    assert epoch(first, 1) == epoch(again, 1)
    assert epoch(first, 1) != epoch(first, 2)
    assert epoch(first, 1) != epoch(other_seed, 1)


def test_going_on_in_an_epoch_gives_its_remaining_steps():
    sampler = StepSampler(DATA, 4, 2, False, 0)
    whole = epoch(sampler)
    sampler.first_step = 5
    assert epoch(sampler) == whole[10:] and len(sampler) == len(whole) - 10


def test_grouping_keeps_a_pictures_questions_together():
    sampler = StepSampler(DATA, 4, 4, True, 0)
    pictures = [len({DATA[i].picture for i in batch}) for batch in epoch(sampler)]
    mixed = [len({DATA[i].picture for i in batch}) for batch in epoch(StepSampler(DATA, 4, 4, False, 0))]
    assert sum(pictures) < 0.6 * sum(mixed)
    order = [DATA[i].picture for batch in epoch(sampler) for i in batch]
    assert order != sorted(order)


def test_examples_on_one_picture_lie_side_by_side_in_a_batch():
    for batch in epoch(StepSampler(DATA, 16, 16, False, 0)):
        pictures = [DATA[i].picture for i in batch]
        runs = [p for k, p in enumerate(pictures) if k == 0 or p != pictures[k - 1]]
        assert len(runs) == len(set(runs))


def test_rows_are_cut_so_that_the_most_work_is_as_little_as_can_be():
    """Against all ways to cut the rows, by length, into so many batches."""
    for seed in range(20):
        sampler = StepSampler(DATA, 8, 2, True, seed, processes=2)
        numbers = random.Random(seed).sample(range(len(DATA)), 8)
        cut = sampler.cut(numbers)
        assert len(cut) == 4 and [sampler.work(batch) for batch in cut] == sorted(map(sampler.work, cut))
        assert sorted(i for batch in cut for row in batch for i in row) == sorted(numbers)
        rows = sorted((row for batch in cut for row in batch), key=sampler.length)
        ways = combinations_with_replacement(range(len(rows) + 1), 3)
        ways = [[rows[a:b] for a, b in pairwise([0, *way, len(rows)])] for way in ways]
        best = min(max(map(sampler.work, way)) for way in ways if max(map(len, way)) <= 2)
        assert max(map(sampler.work, cut)) == best


def lengths_of(batch):
    """{picture: the text tokens on it}."""
    lengths = Counter()
    for i in batch:
        lengths[DATA[i].picture] += len(DATA[i].prompt_ids) + len(DATA[i].answer_ids)
    return lengths


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_micro_batch_takes_no_more_than_batch_size_pictures_with_a_question_each(batch_size):
    """However many questions there are on a picture, as far as accumulation brings them into one step."""
    data = [example for example in DATA for _ in range(20)]
    longest = max(len(example.prompt_ids) + len(example.answer_ids) for example in data)
    sampler = StepSampler(data, batch_size * 32, batch_size, True, 0)
    for batch in epoch(sampler):
        lengths = Counter({data[i].picture: PREFIX for i in batch})
        for i in batch:
            lengths[data[i].picture] += len(data[i].prompt_ids) + len(data[i].answer_ids)
        assert len(lengths) * max(lengths.values(), default=0) <= batch_size * (PREFIX + longest)


@pytest.mark.parametrize("pictures", [1, 3, 100])
@pytest.mark.parametrize("tokens", [40, 100, 10_000])
def test_whole_rows_hold_each_example_once(pictures, tokens):
    numbers = [i for i in range(len(DATA)) if i % 5]
    batches = whole_rows(DATA, numbers, pictures, tokens)
    assert Counter(i for batch in batches for i in batch) == Counter(numbers)
    most = pictures * (PREFIX + max(len(DATA[i].prompt_ids) + len(DATA[i].answer_ids) for i in numbers))
    for batch in batches:
        lengths = lengths_of(batch)
        assert len(lengths) == 1 or len(lengths) * (PREFIX + max(lengths.values())) <= most
        assert max(lengths.values()) <= tokens
    if tokens == 40:  # a question a row, which fill the batches, but the last of each manieth row of its picture
        sizes = [len(lengths_of(batch)) for batch in batches]
        assert sum(size < pictures for size in sizes) <= max(Counter(DATA[i].picture for i in numbers).values())
    if tokens == 10_000:
        of_picture = Counter(picture for batch in batches for picture in {DATA[i].picture for i in batch})
        assert set(of_picture.values()) == {1}
        longest = [max(lengths_of(batch).values()) for batch in batches]
        shortest = [min(lengths_of(batch).values()) for batch in batches]
        assert all(a <= b for a, b in zip(longest, shortest[1:], strict=False))  # of similar length together
