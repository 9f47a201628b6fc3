"""What is trained on, and that every step is the one it should be: equalities against plain computations."""

import copy
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import finetune_moondream as script
from moondream2.checkpoints import Progress, Stop
from moondream2.cli import InputError
from moondream2.features import image_embeds
from moondream2.pictures import pixels_of
from moondream2.rows import StepSampler, row_length, rows_of, text_inputs
from tests.shared import (
    both_releases,
    constants,
    dataset,
    engine_of,
    layer_out,
    plain_answer,
    plain_mask,
    plain_prompt,
    step_of,
)

pytestmark = pytest.mark.smallest


@pytest.fixture
def train(data, tokenizer):
    return dataset(data / "train.jsonl", tokenizer)


def plain_losses(model, tokenizer, examples, pictures):
    """The summed loss of each example, as the original computes it: one row each, whole logits, -100 elsewhere."""
    losses = []
    for example in examples:
        prompt, answer = plain_prompt(example.question, tokenizer), plain_answer(example.answer, tokenizer)
        with torch.no_grad():
            pixels = pixels_of(pictures[example.picture], model.vision_encoder.preprocess)
            image = model.vision_encoder([pixels])
        ids = model.get_input_embeddings()(torch.tensor([[tokenizer.bos_token_id, *prompt, *answer]]))
        embeds = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
        labels = torch.tensor([-100] * (1 + image.shape[1] + len(prompt)) + answer)
        mask = plain_mask(model, embeds.shape[1])
        logits = model.text_model(inputs_embeds=embeds, attention_mask=mask).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
    return losses


@both_releases
@pytest.mark.parametrize("multiple", [1, 64])
def test_targets_are_the_answers_and_nothing_else(tiny, tokenizer, train, multiple):
    """At each answer position the next token of its row is the target; everything else has none."""
    rows = rows_of(train.examples, 10_000)
    batch = script.collate(rows, partial(layer_out(tiny, tokenizer, train), multiple=multiple))
    assert batch["rows"] == rows and len(rows) == len(train.pictures) < len(train)
    image, tokens = tiny.config.image_tokens, batch["document_ids"].shape[1]
    seen = []
    for r, row in enumerate(rows):
        ids = torch.cat([batch["input_ids"][r, :1], torch.full((image,), -1), batch["input_ids"][r, 1:]])
        document_ids = batch["document_ids"][r]
        targets = torch.full_like(ids, -100)
        here = batch["answer_positions"] // tokens == r
        positions = batch["answer_positions"][here] % tokens
        targets[positions + 1] = batch["targets"][here]
        seen += positions.tolist()
        assert (targets[document_ids <= 0] == -100).all()
        for k, example in enumerate(row, start=1):
            prompt, answer = plain_prompt(example.question, tokenizer), plain_answer(example.answer, tokenizer)
            assert ids[document_ids == k].tolist() == prompt + answer
            assert targets[document_ids == k].tolist() == [-100] * len(prompt) + answer
            places = batch["position_ids"][r][document_ids == k].tolist()
            assert places == list(range(1 + image, 1 + image + len(prompt + answer)))
    assert len(seen) == len(batch["targets"]) == sum(len(example.answer_ids) for example in train)
    longest = max(row_length(row, 1 + image) for row in rows)
    assert tokens % multiple == 0 and longest <= tokens < longest + multiple


@both_releases
def test_what_is_trained_on_is_what_answer_question_continues(tiny, tokenizer, train, monkeypatch):
    example = train[3]
    batch = script.collate([[example]], layer_out(tiny, tokenizer, train))
    calls = []
    forward = tiny.text_model.forward
    monkeypatch.setattr(tiny.text_model, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    embeds = image_embeds(batch["pictures"], tiny.vision_encoder, "cpu")
    tiny.answer_question(embeds, example.question, tokenizer, max_new_tokens=1)
    asked = calls[0]
    prompt = len(example.prompt_ids)
    assert torch.equal(asked["input_ids"], batch["input_ids"][:, : 1 + prompt])
    assert torch.equal(asked["position_ids"], batch["position_ids"][:, : 1 + tiny.config.image_tokens + prompt])
    assert torch.equal(asked["image_embeds"], embeds)
    assert batch["targets"].tolist() == example.answer_ids


def summed_loss(model, batch):
    """The script's loss of a micro-batch, not divided."""
    embeds = image_embeds(batch["pictures"], model.vision_encoder, "cpu")
    return script.answer_loss(model.text_model, batch, embeds, "cpu")


@both_releases
@pytest.mark.parametrize(
    "numbers",
    [[0], [1, 2, 3, 4], [0, 5, 7, 10], list(range(19)), [4, 9, 1, 2]],
    ids=["one question", "several on a picture", "different pictures", "all", "mixed"],
)
def test_shared_rows_have_the_loss_and_gradient_of_separate_ones(tiny, tokenizer, train, numbers):
    examples = [train[i] for i in numbers]
    plain = sum(plain_losses(tiny, tokenizer, examples, train.pictures))
    plain.backward()
    expected = {name: p.grad.clone() for name, p in tiny.text_model.named_parameters()}
    tiny.zero_grad()
    loss = summed_loss(tiny, script.collate(rows_of(examples, 10_000), layer_out(tiny, tokenizer, train)))
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, parameter in tiny.text_model.named_parameters():
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert difference < 1e-5, name


@both_releases
def test_in_bfloat16_shared_rows_differ_no_more_than_plain_runs_do(tiny, tokenizer, train):
    """Two plain runs, one row at a time and all rows padded to a batch, differ by rounding: that is the measure."""
    tiny.bfloat16()
    examples = [train[i] for i in (0, 1, 2, 3, 4, 5, 7, 10)]
    rows = rows_of(examples, 10_000)
    assert len(rows) < len(examples)
    sum(plain_losses(tiny, tokenizer, examples, train.pictures)).backward()
    plain = torch.cat([p.grad.double().flatten() for p in tiny.text_model.parameters()])
    padded = plain_padded_gradient(tiny, tokenizer, examples, train.pictures)
    tiny.zero_grad()
    summed_loss(tiny, script.collate(rows, layer_out(tiny, tokenizer, train))).backward()
    gradient = torch.cat([p.grad.double().flatten() for p in tiny.text_model.parameters()])
    tolerance = (padded - plain).norm() / plain.norm()
    shared = (gradient - plain).norm() / plain.norm()
    print(f"padded {tolerance:.2e}, shared {shared:.2e}")
    assert 0 < shared < 1.2 * tolerance


def plain_padded_gradient(model, tokenizer, examples, pictures):
    """The gradient of the summed loss, all examples padded to one batch, whole logits."""
    model.zero_grad()
    with torch.no_grad():
        images = model.vision_encoder(
            [pixels_of(pictures[each.picture], model.vision_encoder.preprocess) for each in examples]
        )
    texts = [torch.tensor([tokenizer.bos_token_id, *each.prompt_ids, *each.answer_ids]) for each in examples]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=tokenizer.bos_token_id)
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :1], images, embeds[:, 1:]], dim=1)
    labels, mask = torch.full(embeds.shape[:2], -100), torch.zeros(embeds.shape[:2], dtype=torch.long)
    for r, each in enumerate(examples):
        start = 1 + images.shape[1] + len(each.prompt_ids)
        labels[r, start : start + len(each.answer_ids)] = torch.tensor(each.answer_ids)
        mask[r, : start + len(each.answer_ids)] = 1
    padding = mask.bool()[:, None, None, :] | torch.eye(mask.shape[1], dtype=torch.bool)
    mask = plain_mask(model, mask.shape[1]) & padding
    logits = model.text_model(inputs_embeds=embeds, attention_mask=mask).logits.float()
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    ).backward()
    return torch.cat([p.grad.double().flatten() for p in model.text_model.parameters()])


def test_only_answer_positions_go_through_the_head(tiny, tokenizer, train):
    seen = []
    tiny.text_model.lm_head.linear.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    summed_loss(tiny, script.collate(rows_of(train.examples[:3], 10_000), layer_out(tiny, tokenizer, train)))
    assert seen == [(sum(len(train[i].answer_ids) for i in range(3)), tiny.config.text_config.vocab_size)]


def train_for(engine, model, batches, progress=None, **changes):
    """The steps of an epoch, each a list of micro-batches, through the script's own loop; where it got to."""
    progress = progress or Progress({}, epoch=1)
    checkpoints = SimpleNamespace(is_due=lambda minutes: False, save=lambda *args: None)
    script.train_epoch(
        engine,
        iter(batches),
        model.vision_encoder,
        progress,
        checkpoints,
        Stop(engine.accelerator),
        constants(**changes),
    )
    return progress


def collated(model, tokenizer, train, step_size, batch_size, group=True, epoch=1, folder=None):
    """An epoch's steps, as the script makes them."""
    prefix = 1 + model.config.image_tokens
    sampler, load = (
        StepSampler(train, prefix, step_size, batch_size, group, 0),
        layer_out(model, tokenizer, train, folder=folder),
    )
    return [[script.collate(rows, load) for rows in step] for step in sampler.epoch(epoch)]


@both_releases
@pytest.mark.parametrize("group", [False, True])
def test_a_step_is_the_same_however_it_is_cut(tiny, tokenizer, train, group):
    def trained(batch_size):
        model = copy.deepcopy(tiny)
        optimizer = torch.optim.SGD(
            model.text_model.parameters(), lr=0.1, fused=True
        )  # AdamW makes steps of rounding noise
        progress = train_for(
            engine_of(model, optimizer), model, collated(model, tokenizer, train, 8, batch_size, group)
        )
        assert progress.step == 3  # 19 examples: 8, 8 and 3
        return progress.loss_sum / progress.tokens, model.state_dict()

    loss, weights = trained(8)
    start = tiny.state_dict()
    for batch_size in (4, 1):
        other_loss, other = trained(batch_size)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, tensor in weights.items():
            assert (other[name] - tensor).norm() <= 1e-4 * (tensor - start[name]).norm() + 1e-6, name


def test_a_step_is_adamw_on_the_mean_over_its_answer_tokens(tiny, tokenizer, train, monkeypatch):
    model, load = copy.deepcopy(tiny), layer_out(tiny, tokenizer, train)
    engine = engine_of(model)
    numbers = ([0, 1, 2, 3], [8, 9])
    batches = [script.collate(rows_of([train[i] for i in each], 10_000), load) for each in numbers]
    gradients = {}

    def step():
        for name, p in model.text_model.named_parameters():
            gradients[name] = p.grad / engine.optimizer.grad_scale

    monkeypatch.setattr(engine.optimizer, "step", step)
    step = step_of(engine, batches, model.vision_encoder, max_grad_norm=0.5)

    examples = [train[i] for each in numbers for i in each]
    expected = sum(plain_losses(tiny, tokenizer, examples, train.pictures)) / sum(len(e.answer_ids) for e in examples)
    expected.backward()
    assert step.tokens == sum(len(e.answer_ids) for e in examples)
    assert step.loss == pytest.approx(expected.item(), rel=1e-5)
    total = math.sqrt(sum(p.grad.square().sum().item() for p in tiny.text_model.parameters()))
    assert step.grad_norm == pytest.approx(total, rel=1e-4) and step.grad_norm > 0.5
    for name, parameter in tiny.text_model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad * 0.5 / total, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("shapes", [[(300, 40), (70,), (9, 9)], [(4096, 4096), (4096,)]], ids=["small", "large"])
def test_the_gradients_length_is_exact_in_bfloat16(shapes):
    """12.7285 and not the nearest bfloat16, 12.75, nor off by what a long sum in float32 loses: against float64."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape).bfloat16()
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
    norm = script.gradient_norm(parameters)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=5e-5)
    assert torch.tensor(exact).bfloat16().item() != pytest.approx(exact, rel=5e-5)
    if len(shapes) == 2:
        whole = torch.linalg.vector_norm(parameters[0].grad, dtype=torch.float32).item()
        assert whole != pytest.approx(exact, rel=5e-5), "the parts show nothing"


def test_the_gradients_length_takes_two_norms_however_many_there_are(tiny):
    """One call for the norms of all, which a card answers by a few kernels, and the norm of these."""
    for p in tiny.text_model.parameters():
        p.grad = torch.ones_like(p)
    with NotingCalls() as noting:
        norm = script.gradient_norm(tiny.text_model.parameters())
    assert norm.item() == pytest.approx(math.sqrt(sum(p.numel() for p in tiny.text_model.parameters())), rel=1e-5)
    assert [name for name in noting.names if "norm" in name] == ["_foreach_norm.Scalar", "linalg_vector_norm.default"]


class NotingCalls(TorchDispatchMode):
    """Notes the names of torch's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_a_learning_rate_is_logged_with_the_step_that_it_made(tiny, tokenizer, train):
    engine = engine_of(tiny, lr_schedule="linear", warmup_steps=2, learning_rate=1e-3, steps=5)
    batches = collated(tiny, tokenizer, train, 4, 4)
    rates = [step_of(engine, step, tiny.vision_encoder, 1.0).learning_rate for step in batches]
    assert rates == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy")


class NotingReads(TorchDispatchMode):
    """Notes what brings numbers to the host, by torch's own operators too."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.events.append(function)
        return function(*args, **(kwargs or {}))


def test_the_host_waits_once_a_step_behind_the_next_ones_passes_and_before_its_update(
    tiny, tokenizer, train, monkeypatch, as_on_a_card
):
    """And processes exchange once a step: three steps of two micro-batches."""
    engine, load, events = engine_of(tiny), layer_out(tiny, tokenizer, train), []
    batches = [script.collate(rows_of([train[i], train[i + 1]], 10_000), load) for i in (0, 2, 4, 6, 8, 10)]
    steps = [batches[:2], batches[2:4], batches[4:]]

    def noting(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **words: (events.append(name), original(*args, **words))[1])

    for name in READS:
        noting(torch.Tensor, name)
    noting(engine.accelerator, "reduce")
    noting(engine.optimizer, "step")
    tiny.text_model.register_forward_pre_hook(lambda *args: events.append("forward"))
    with NotingReads(events):
        for _ in script.train_steps(engine, steps, tiny.vision_encoder, 1.0):
            events.append("told")
    passes, update, told = ["forward", "forward"], ["reduce", "step"], ["tolist", "told"]
    assert events == passes + update + (passes + told + update) * 2 + told


def multiplied(factors, *arguments):
    return image_embeds(*arguments) * next(factors)


@pytest.mark.parametrize("place", ["CPU", "card"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tiny, tokenizer, train, request, place):
    """Of weights, moments, counts, decay that is owed, schedule: all bits are those of a run without it."""
    if place == "card":
        request.getfixturevalue("as_on_a_card")
    batches = [script.collate([[train[i]]], layer_out(tiny, tokenizer, train)) for i in (0, 5, 7)]
    changes = {"learning_rate": 1e-3, "weight_decay": 2.0**-4, "warmup_steps": 9}  # what is owed decays in the third
    ends, rates = [], []
    for lost in (False, True):
        model = copy.deepcopy(tiny).bfloat16()
        engine = engine_of(model, **changes)
        factors = iter([1, math.nan, math.inf, 1, 1] if lost else [1, 1, 1])
        steps = [[batches[i]] for i in ([0, 1, 2, 1, 2] if lost else [0, 1, 2])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "image_embeds", partial(multiplied, factors))
            done = list(script.train_steps(engine, steps, model.vision_encoder, 1.0))
        assert [step.is_applied for step in done] == ([True, False, False, True, True] if lost else [True] * 3)
        rates.append([step.learning_rate for step in done if step.is_applied])
        ends.append((model.state_dict(), engine.optimizer.state_dict(), engine.scheduler.state_dict()))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert rates[0] == rates[1] == pytest.approx([1e-3 / 9, 2e-3 / 9, 3e-3 / 9])


def test_a_picture_that_breaks_leaves_the_mean_over_what_is_left(tiny, tokenizer, train):
    """In a step of two micro-batches, clipped: loss, gradient and tokens are those of a plain loop over the others."""
    examples = [train[i] for i in (0, 1, 5, 7)]  # on four pictures
    gone = train.pictures[examples[1].picture].path
    left = [example for example in examples if train.pictures[example.picture].path != gone]
    plain = sum(plain_losses(tiny, tokenizer, left, train.pictures)) / sum(len(each.answer_ids) for each in left)
    plain.backward()
    norm = torch.nn.utils.clip_grad_norm_(tiny.text_model.parameters(), 0.1)
    expected = [p.grad.clone() for p in tiny.text_model.parameters()]
    tiny.zero_grad()
    gone.unlink()
    engine, got = engine_of(tiny), []
    engine.optimizer.step = lambda: got.extend(
        p.grad / engine.optimizer.grad_scale for p in tiny.text_model.parameters()
    )
    load = layer_out(tiny, tokenizer, train)
    batches = [script.collate(rows_of(each, 10_000), load) for each in (examples[:2], examples[2:])]
    step = step_of(engine, batches, tiny.vision_encoder, 0.1)
    assert step.tokens == sum(len(each.answer_ids) for each in left) and len(batches[0]["failed"]) == 1
    assert step.loss == pytest.approx(plain.item(), abs=1e-6) and step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


def test_a_micro_batch_that_sharing_left_empty_costs_nothing(tiny, tokenizer, train):
    model, calls = copy.deepcopy(tiny), []
    engine, load = engine_of(model), layer_out(tiny, tokenizer, train)
    model.text_model.register_forward_pre_hook(lambda *args: calls.append(1))
    four = [example for example in train if example.picture == train[1].picture]
    batches = [script.collate(rows, load) for rows in ([], [], [four[:2]], [four[2:]])]
    step = step_of(engine, batches, model.vision_encoder, 1.0)
    assert len(calls) == 2 and step.tokens == sum(len(example.answer_ids) for example in four)
    expected = sum(plain_losses(tiny, tokenizer, four, train.pictures)) / step.tokens
    assert step.loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_without_tokens_updates_nothing(tiny, tokenizer, train):
    """All its pictures have gone: in step with other processes, but no AdamW step and no move of the schedule."""
    model = copy.deepcopy(tiny)
    engine = engine_of(model, warmup_steps=10)
    step = step_of(engine, [script.collate([], layer_out(tiny, tokenizer, train))], model.vision_encoder, 1.0)
    assert (step.loss, step.tokens, step.is_applied) == (0.0, 0, False)
    assert engine.scheduler.last_epoch == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tiny.state_dict()[name]), name


def test_what_the_loss_does_not_reach_comes_out_bit_for_bit(tiny, tokenizer, train):
    model = tiny.bfloat16()
    before = copy.deepcopy(model.state_dict())
    engine = engine_of(model, learning_rate=1e-2, weight_decay=0.5)
    train_for(engine, model, collated(model, tokenizer, train, 4, 4))
    for name, tensor in model.state_dict().items():
        if name.startswith("text_model."):
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_a_step_that_is_not_finite_is_not_applied(tiny, tokenizer, train, capsys):
    engine, before = engine_of(tiny), copy.deepcopy(tiny.state_dict())
    steps = collated(tiny, tokenizer, train, 4, 4)  # 5 steps: the second, fourth and fifth fail
    poison = iter([False, True, False, True, True, True])
    embed = image_embeds

    def poisoned(*args):
        embeds = embed(*args)
        return embeds * math.nan if next(poison) else embeds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "image_embeds", poisoned)
        progress = train_for(engine, tiny, steps)
        out = capsys.readouterr().err
        assert out.count("Step not applied: loss nan") == 3
        assert "train.jsonl:" in out
        assert all(tensor.isfinite().all() for tensor in tiny.state_dict().values())
        assert any(not torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
        assert math.isfinite(progress.loss_sum)
        patch.setattr(script, "image_embeds", lambda *args: embed(*args) * math.nan)
        with pytest.raises(
            InputError, match="3 steps in a row without a finite loss.*--overwrite true and a lower LEA"
        ):
            train_for(engine, tiny, steps)


def losses_in(dtype, tiny, tokenizer, train, folder, optimizer=None):
    """The mean training loss of the last of five epochs at a rate whose steps bfloat16 rounds away."""
    model = copy.deepcopy(tiny).to(dtype)
    if optimizer:
        optimizer = optimizer(model.text_model.parameters(), lr=3e-5, betas=(0.9, 0.999), fused=True)
    engine = engine_of(model, optimizer, learning_rate=3e-5)
    for epoch in range(1, 6):
        progress = train_for(engine, model, collated(model, tokenizer, train, 4, 4, epoch=epoch, folder=folder))
    return progress.loss_sum / progress.tokens


@pytest.mark.slow
def test_bfloat16_trains_as_float32_does(tiny, tokenizer, train, tmp_path):
    tiny.bfloat16().float()  # the same start for both
    reference = losses_in(torch.float32, tiny, tokenizer, train, tmp_path)
    assert losses_in(torch.bfloat16, tiny, tokenizer, train, tmp_path) == pytest.approx(reference, rel=0.03)
    plain = losses_in(torch.bfloat16, tiny, tokenizer, train, tmp_path, torch.optim.AdamW)
    assert plain > 1.2 * reference, "plain AdamW would pass: this test shows nothing"


def test_the_loss_is_that_of_bfloat16s_own_logits_in_float32(tiny, tokenizer, train):
    batch, logits = script.collate(rows_of(train.examples, 10_000), layer_out(tiny.bfloat16(), tokenizer, train)), []
    tiny.text_model.lm_head.linear.register_forward_hook(lambda module, args, out: logits.append(out.double()))
    loss = summed_loss(tiny, batch)
    expected = F.cross_entropy(logits[0], batch["targets"], reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


@both_releases
def test_padding_changes_no_loss_and_no_gradient(tiny, tokenizer, train):
    """Rows of a question each, which have no mask, and of several."""
    for examples in (train.examples[:3], train.examples):
        losses, gradients = [], []
        for multiple in (1, 64):
            load = partial(layer_out(tiny, tokenizer, train), multiple=multiple)
            batch = script.collate(rows_of(examples, 10_000), load)
            tiny.zero_grad()
            loss = summed_loss(tiny, batch) / len(batch["targets"])
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in tiny.text_model.parameters()]))
        plain = sum(plain_losses(tiny, tokenizer, examples, train.pictures)).item() / len(batch["targets"])
        assert losses == pytest.approx([plain, losses[0]], abs=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_rows_of_one_question_need_no_mask(tiny, tokenizer, train):
    """Without one, attention takes its fastest way."""
    one, several = (
        text_inputs(script.collate(rows_of(examples, 10_000), layer_out(tiny, tokenizer, train)), "cpu")
        for examples in ([train[0], train[1]], train.examples)
    )
    assert "attention_mask" not in one and "attention_mask" in several


def test_gradients_are_exchanged_once_in_a_steps_last_backward_pass(tiny, tokenizer, train, monkeypatch):
    engine, load, waits = engine_of(tiny), layer_out(tiny, tokenizer, train), []
    batches = [script.collate(rows_of([train[i]], 10_000), load) for i in (0, 1, 5)]
    monkeypatch.setattr(engine.accelerator, "no_sync", lambda model: (waits.append(model), nullcontext())[1])
    step_of(engine, batches, tiny.vision_encoder, 1.0)
    assert waits == [engine.text_model] * 2


def test_all_that_a_loss_takes_goes_to_the_device(tiny, tokenizer, train, monkeypatch):
    """The device "meta" stands in for a card."""
    batch, given = script.collate(rows_of(train.examples, 10_000), layer_out(tiny, tokenizer, train)), {}

    def text_model(**inputs):
        given.update(inputs)
        return SimpleNamespace(logits=torch.empty(len(batch["targets"]), 9, device="meta"))

    def cross_entropy(logits, targets, reduction):
        given["targets"] = targets
        return logits.sum()

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    script.answer_loss(text_model, batch, torch.empty(8, 81, 9, device="meta"), "meta")
    assert len(given) == 6 and {tensor.device.type for tensor in given.values()} == {"meta"}


def test_the_seconds_of_an_epoch_go_on_from_those_before_an_interruption(tiny, tokenizer, train):
    progress = Progress({}, epoch=1, seconds=1000.0)
    train_for(engine_of(tiny), tiny, collated(tiny, tokenizer, train, 19, 19), progress)
    assert 1000 < progress.seconds < 1100
