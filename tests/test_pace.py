"""How fast a run trains, what is left of it, and which BATCH_SIZE fits: counted apart, under a clock that is set."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import launch, log, pace
from moondream2.checkpoints import Progress
from moondream2.features import image_embeds
from moondream2.pace import Pace, in_words, larger_batch_size, operations, peak_rate
from moondream2.rows import StepSampler, text_tokens
from tests.shared import TINY, constants, dataset, layer_out
from tests.test_rows import PREFIX, Example
from tests.test_training import collated

GIB = 2**30


@pytest.fixture
def train(data, tokenizer):
    return dataset(data / "train.jsonl", tokenizer)


@pytest.fixture
def clock(monkeypatch):
    """`clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def card(monkeypatch):
    """`card.peak` and `card.at_rest`, bytes that torch says it has held; 80 GiB of an H100, 4 of them another's.

    `card.wait` is called where the host waits for all that it has sent.
    """
    card = SimpleNamespace(peak=20 * GIB, at_rest=12 * GIB, wait=lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: card.wait())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: card.peak)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: card.at_rest)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (46 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    return card


def watching(model, sampler, epochs=3, device="cpu", processes=1):
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    return Pace(model.text_model, accelerator, sampler, epochs)


def test_operations_are_those_that_torch_counts(tokenizer, train):
    """It counts whole products of attention, of which the later half is not needed."""
    tiny = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    config, lay_out = tiny.config.text_config, layer_out(tiny, tokenizer, train)
    batch = script.collate([[train[0]]], lay_out)
    embeds = image_embeds(batch["pictures"], tiny.vision_encoder, "cpu")
    with FlopCounterMode(display=False) as counter:
        script.answer_loss(tiny.text_model, batch, embeds, "cpu").backward()
    tokens = batch["document_ids"].shape[1]
    unneeded = 6 * config.num_hidden_layers * tokens**2 * config.hidden_size
    total = operations(config, batch)
    assert total == counter.get_total_flops() - unneeded
    assert operations(config, script.collate([[train[0]]], partial(lay_out, multiple=64))) == total
    assert operations(config, batch, is_all_trained=False) == total * 2 / 3


def test_rates_are_of_what_was_trained_since_the_epoch_began(tiny, tokenizer, train, clock):
    """With three processes; padding and questions that fell out don't count."""
    sampler, lay_out = (
        StepSampler(train, 82, 4, 2, True, 0, 0, 3),
        partial(layer_out(tiny, tokenizer, train), multiple=64),
    )
    steps = [
        [script.collate(rows, lay_out) for rows in step] for step in StepSampler(train, 82, 4, 2, True, 0).epoch(1)
    ]
    watched, progress = watching(tiny, sampler, processes=3), Progress({}, epoch=1, history=[{"seconds": 7.0}])
    assert watched.figures(progress) == {}
    steps[1][0]["rows"] = []
    for _ in range(2):  # another epoch begins anew
        done = []
        for step in watched.watched(steps[:3]):
            clock.now += 10
            done.append(step)
        batches = [batch for step in done for batch in step if batch["rows"]]
        examples = [example for batch in batches for row in batch["rows"] for example in row]
        positions = sum(82 * len(batch["rows"]) for batch in batches) + sum(map(text_tokens, examples))
        figures = watched.figures(progress)
        assert figures["questions_per_second"] == round(3 * len(examples) / 30, 4)
        assert figures["tokens_per_second"] == round(3 * positions / 30, 4)
        assert figures.keys() == {"questions_per_second", "tokens_per_second", "seconds_left"}


def test_what_is_left_is_of_the_whole_run(tiny, tokenizer, train, clock):
    """In the middle of an epoch, before and after it is judged, and at the end: 2 s a step, 7 s to judge."""
    sampler = StepSampler(train, 82, 4, 4, True, 0)
    watched, progress = watching(tiny, sampler), Progress({}, epoch=1, history=[{"seconds": 7.0}])
    assert sampler.steps == 5
    left = []
    for _ in watched.watched([[{"rows": []}]] * 5):
        left.append(watched.figures(progress).get("seconds_left"))
        clock.now += 2
        progress.step += 1
    left.append(watched.figures(progress)["seconds_left"])
    progress.end_epoch({"epoch": 1, "seconds": 17.0})
    left.append(watched.figures(progress)["seconds_left"])
    assert left == [None, *(2 * (4 - done) + 7 + 2 * 17 for done in range(4)), 41, 34]
    progress.epoch = 4
    assert watched.figures(progress)["seconds_left"] == 0
    assert "left" not in in_words(watched.figures(progress))


def test_a_cards_share_and_memory(tiny, tokenizer, train, clock, card):
    watched, progress = watching(tiny, StepSampler(train, 82, 4, 4, True, 0), device="cuda"), Progress({}, epoch=1)
    steps = collated(tiny, tokenizer, train, 4, 4)
    card.wait = lambda: setattr(clock, "now", clock.now + 1e-6)  # the last step is still under way
    for _ in watched.watched(steps):
        clock.now += 1e-6
    total = sum(operations(tiny.config.text_config, batch) for step in steps for batch in step)
    figures = watched.figures(progress)
    assert figures["share_of_peak"] == pytest.approx(total / (len(steps) * 1e-6 + 1e-6) / 989e12, abs=1e-4)
    assert figures["share_of_peak"] > 0.01 and figures["peak_memory_gib"] == 20
    share = f"{figures['share_of_peak']:.0%}"
    assert f" tokens/s, {share} of the card's peak rate, 20.0 GiB at most" in in_words(figures)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_peak_is_that_of_just_this_card(name, peak):
    assert peak_rate(name) == peak


def equal_data(pictures, questions, tokens=20):
    return [Example(0, f"p{p}", [0] * (tokens - 3), [0] * 3) for p in range(pictures) for _ in range(questions)]


def test_a_larger_batch_size_is_told_where_it_saves_positions(capsys):
    """8 questions of 20 tokens on each of 32 pictures: 4 rows of 770 positions each, or one of 890."""
    sampler = StepSampler(equal_data(32, 8), PREFIX, 2, 2, True, 0)
    assert larger_batch_size(sampler, 2) == (8, 32 * 890, 32 * 4 * 770)
    log.step_size(sampler, 2)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "BATCH_SIZE 8 would take 28,480 positions an epoch in place of 98,560, 3.5 times fewer" in said
    assert said.endswith("LEARNING_RATE may want to grow with it")
    for questions, batch_size, group in ((8, 8, True), (1, 2, True), (2, 2, True), (8, 2, False)):
        sampler = StepSampler(equal_data(500, questions), PREFIX, batch_size, batch_size, group, 0)
        assert larger_batch_size(sampler, batch_size) is None, (questions, batch_size, group)
    log.step_size(sampler, 2)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_positions_of_a_large_set_are_told_from_some_steps():
    sampler = StepSampler(equal_data(4000, 4), PREFIX, 2, 2, True, 0)
    assert pace.positions_of_an_epoch(sampler) == 8000 * 770
    assert sum(1 for _ in pace.micro_batches(sampler)) == pace.SAMPLED


@pytest.mark.parametrize(
    ("questions", "peak", "expected"),
    [
        (1, 20, (8, 12 + 4 * 8)),  # 8 GiB for the 2 rows of BATCH_SIZE 2: 16 rows would take 76 of 76
        (1, 13, (64, 12 + 32)),  # the data have no more than 64 questions
        (8, 20, (32, 12 + 8 * 4 * 890 / 770)),  # 8 GiB for a row of 2 questions; one of 8 is little longer
        (1, 50, (2, 50)),
    ],
)
def test_the_batch_size_that_fits_is_told_by_what_an_epoch_took(tiny, card, capsys, questions, peak, expected):
    """Of 76 GiB that are free or this run's."""
    sampler = StepSampler(equal_data(64 // questions, questions), PREFIX, 2, 2, True, 0)
    watched, c = watching(tiny, sampler, device="cuda"), constants(batch_size=2, epochs=3)
    record = {"epoch": 1, "train_loss": 1.0, "valid_loss": 1.0, "valid_accuracy": None, "seconds": 3.0}
    log.epoch(record, record, 0.5, c, watched)
    assert "BATCH_SIZE" not in capsys.readouterr().out  # nothing is known yet
    card.peak = 5 * GIB
    for step in watched.watched(steps_of(sampler)):
        assert step
        card.peak = peak * GIB
    log.epoch(record, record, 0.5, c, watched)
    said, (fits, gib) = capsys.readouterr().out.splitlines()[-1], expected
    assert said.startswith(f"BATCH_SIZE {fits} ") and said.endswith(f"{gib:.1f} of 76.0 GiB, by this epoch's")
    assert ("the largest that surely fits" in said) == (fits == 2)
    log.epoch({**record, "epoch": 2}, record, 0.5, c, watched)
    assert "BATCH_SIZE" not in capsys.readouterr().out


def test_what_came_before_training_may_have_taken_more_memory(tiny, card):
    sampler = StepSampler(equal_data(64, 1), PREFIX, 2, 2, True, 0)
    watched = watching(tiny, sampler, device="cuda")
    for _ in watched.watched(steps_of(sampler)):
        pass  # the peak stays what it was
    assert watched.batch_size_that_fits(2) is None


def steps_of(sampler):
    """Steps of micro-batches that hold no more than what is counted."""
    for step in sampler.epoch(1):
        yield [
            {"rows": rows, "document_ids": torch.zeros(len(rows), sampler.work(rows) // len(rows)), "targets": [0]}
            for rows in step
        ]


def test_log_bar_tracker_and_page_tell_the_pace(data, run_main, capsys):
    flags = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl", "epochs": 2}
    run_main(**flags, output_dir=data / "out", features_dir="none", batch_size=2, tracker="tensorboard")
    said, bar = capsys.readouterr()
    records = [json.loads(line) for line in (data / "out" / "training_log.jsonl").read_text().splitlines()]
    names = {"questions_per_second", "tokens_per_second", "seconds_left"}
    assert [names & record.keys() for record in records] == [set(), names, names]
    assert records[1]["seconds_left"] > 0 and records[2]["seconds_left"] == 0
    for record in records[1:]:
        assert 19 / record["seconds"] < record["questions_per_second"]  # the record's seconds are judging's as well
        assert f" s ({in_words(record)})\n" in said
    assert " questions/s, " in bar and "of the run left" in bar
    events = EventAccumulator(str(data / "out" / launch.TRACKED)).Reload()
    for name in ("questions_per_second", "tokens_per_second"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([each[name] for each in records[1:]])
    page = (data / "out" / "report.html").read_text()
    rate = f"{records[2]['questions_per_second']:,.3g}"
    assert f'<tr><th scope="row">Questions per second</th><td>{rate}</td></tr>' in page
