"""What is trained on, and that every step is the one it should be: equalities against plain computations."""

import copy
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import finetune_moondream as script
from moondream2.cli import InputError
from moondream2.modeling_moondream2 import prompt_text
from moondream2.pictures import pixels_of
from tests.conftest import collator, dataset, make_run


@pytest.fixture
def train(data, tokenizer):
    return dataset(data / "train.jsonl", tokenizer)


@pytest.fixture
def valid(data, tokenizer):
    return dataset(data / "valid.jsonl", tokenizer)


def plain_losses(model, tokenizer, examples, pictures):
    """The summed loss of each example, as the original computes it: one row each, whole logits, -100 elsewhere."""
    losses = []
    for example in examples:
        prompt = tokenizer(prompt_text(example.question), add_special_tokens=False).input_ids
        answer = [*tokenizer(f" {example.answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            pixels = pixels_of(pictures[example.picture], model.vision_encoder)
            image = model.vision_encoder([pixels])
        ids = model.get_input_embeddings()(torch.tensor([[tokenizer.bos_token_id, *prompt, *answer]]))
        embeds = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
        labels = torch.tensor([-100] * (1 + image.shape[1] + len(prompt)) + answer)
        logits = model.text_model(inputs_embeds=embeds).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
    return losses


def test_labels_are_the_answers_and_nothing_else(tiny, tokenizer, train):
    batch = collator(tiny, tokenizer, train)(list(train.examples))
    assert len(batch["examples"]) == len(train.pictures) < len(train)
    tokens = tiny.config.image_tokens
    for r, row in enumerate(batch["examples"]):
        labels, segments = batch["labels"][r], batch["segments"][r]
        ids = torch.cat([batch["input_ids"][r, :1], torch.full((tokens,), -1), batch["input_ids"][r, 1:]])
        assert (labels[segments <= 0] == -100).all()
        for k, example in enumerate(row, start=1):
            mine, answer = ids[segments == k].tolist(), labels[segments == k]
            prompt = tokenizer(prompt_text(example.question), add_special_tokens=False).input_ids
            expected = tokenizer(f" {example.answer}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            assert mine == prompt + expected
            assert answer.tolist() == [-100] * len(prompt) + expected
            positions = batch["position_ids"][r][segments == k].tolist()
            assert positions == list(range(1 + tokens, 1 + tokens + len(mine)))


def test_what_is_trained_on_is_what_answer_question_continues(tiny, tokenizer, train, monkeypatch):
    example = train[3]
    batch = collator(tiny, tokenizer, train)([example])
    calls = []
    forward = tiny.text_model.forward
    monkeypatch.setattr(tiny.text_model, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    embeds = script.image_embeds(batch, tiny.vision_encoder, collator(tiny, tokenizer, train).store, "cpu")
    tiny.answer_question(embeds, example.question, tokenizer, max_new_tokens=1)
    asked = calls[0]
    prompt = len(example.prompt_ids)
    assert torch.equal(asked["input_ids"], batch["input_ids"][:, : 1 + prompt])
    assert torch.equal(asked["position_ids"], batch["position_ids"][:, : 1 + tiny.config.image_tokens + prompt])
    assert torch.equal(asked["image_embeds"], embeds)
    assert batch["labels"][0, -len(example.answer_ids) :].tolist() == example.answer_ids


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
    collate = collator(tiny, tokenizer, train)
    batch = collate(examples)
    embeds = script.image_embeds(batch, tiny.vision_encoder, collate.store, "cpu")
    loss = script.forward(tiny.text_model, batch, embeds).loss
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, parameter in tiny.text_model.named_parameters():
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert difference < 1e-5, name


def test_in_bfloat16_shared_rows_differ_no_more_than_plain_runs_do(tiny, tokenizer, train):
    """Two plain runs, one row at a time and all rows padded to a batch, differ by rounding: that is the measure."""
    tiny.bfloat16()
    examples = [train[i] for i in (0, 1, 2, 3, 4, 5, 7, 10)]
    collate = collator(tiny, tokenizer, train)

    def gradient(batches):
        tiny.zero_grad()
        for batch in batches:
            embeds = script.image_embeds(batch, tiny.vision_encoder, collate.store, "cpu")
            script.forward(tiny.text_model, batch, embeds).loss.backward()
        return torch.cat([p.grad.double().flatten() for p in tiny.text_model.parameters()])

    sum(plain_losses(tiny, tokenizer, examples, train.pictures)).backward()
    plain = torch.cat([p.grad.double().flatten() for p in tiny.text_model.parameters()])
    assert len(collate(examples)["examples"]) < len(examples)
    padded = plain_padded_gradient(tiny, tokenizer, examples, train.pictures)
    tolerance = (padded - plain).norm() / plain.norm()
    shared = (gradient([collate(examples)]) - plain).norm() / plain.norm()
    print(f"padded {tolerance:.2e}, shared {shared:.2e}")
    assert 0 < shared < 1.2 * tolerance


def plain_padded_gradient(model, tokenizer, examples, pictures):
    """The gradient of the summed loss, all examples padded to one batch, whole logits."""
    model.zero_grad()
    with torch.no_grad():
        images = model.vision_encoder([pixels_of(pictures[each.picture], model.vision_encoder) for each in examples])
    texts = [torch.tensor([tokenizer.bos_token_id, *each.prompt_ids, *each.answer_ids]) for each in examples]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=tokenizer.bos_token_id)
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :1], images, embeds[:, 1:]], dim=1)
    labels, mask = torch.full(embeds.shape[:2], -100), torch.zeros(embeds.shape[:2], dtype=torch.long)
    for r, each in enumerate(examples):
        start = 1 + images.shape[1] + len(each.prompt_ids)
        labels[r, start : start + len(each.answer_ids)] = torch.tensor(each.answer_ids)
        mask[r, : start + len(each.answer_ids)] = 1
    logits = model.text_model(inputs_embeds=embeds, attention_mask=mask).logits.float()
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    ).backward()
    return torch.cat([p.grad.double().flatten() for p in model.text_model.parameters()])


def test_only_answer_positions_go_through_the_head(tiny, tokenizer, train):
    seen = []
    tiny.text_model.lm_head.linear.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    collate = collator(tiny, tokenizer, train)
    batch = collate([train[0], train[1], train[2]])
    script.forward(tiny.text_model, batch, script.image_embeds(batch, tiny.vision_encoder, collate.store, "cpu"))
    tokens = sum(len(train[i].answer_ids) for i in range(3))
    assert seen == [(tokens, tiny.config.text_config.vocab_size)]


@pytest.mark.parametrize("group", [False, True])
def test_a_step_is_the_same_however_it_is_cut(tiny, tokenizer, train, valid, group):
    def trained(batch_size, accum):
        model = copy.deepcopy(tiny)
        run = make_run(
            model, tokenizer, train, valid, batch_size=batch_size, grad_accum_steps=accum, group_by_picture=group
        )
        run.optimizer = torch.optim.SGD(model.text_model.parameters(), lr=0.1)  # AdamW makes steps of rounding noise
        script.train_epoch(run)
        assert run.progress.step == 3  # 19 examples: 8, 8 and 3
        return run.progress.loss_sum / run.progress.tokens, model.state_dict()

    loss, weights = trained(8, 1)
    start = tiny.state_dict()
    for cut in ((4, 2), (1, 8)):
        other_loss, other = trained(*cut)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, tensor in weights.items():
            assert (other[name] - tensor).norm() <= 1e-4 * (tensor - start[name]).norm() + 1e-6, name


def test_a_step_is_adamw_on_the_mean_over_its_answer_tokens(tiny, tokenizer, train, valid):
    run = make_run(copy.deepcopy(tiny), tokenizer, train, valid, batch_size=4, grad_accum_steps=2, max_grad_norm=0.5)
    batches = [run.collate([train[i] for i in numbers]) for numbers in ([0, 1, 2, 3], [8, 9])]
    gradients = {}
    run.optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in run.text_model.named_parameters()})
    loss, norm, tokens = script.train_step(run, batches)

    examples = [train[i] for i in (0, 1, 2, 3, 8, 9)]
    expected = sum(plain_losses(tiny, tokenizer, examples, train.pictures)) / sum(len(e.answer_ids) for e in examples)
    expected.backward()
    assert tokens == sum(len(e.answer_ids) for e in examples)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    total = math.sqrt(sum(p.grad.square().sum().item() for p in tiny.text_model.parameters()))
    assert norm == pytest.approx(total, rel=1e-4) and norm > 0.5
    for name, parameter in tiny.text_model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad * 0.5 / total, rtol=1e-3, atol=1e-7)


def test_a_micro_batch_makes_no_one_wait_for_the_device(tiny, tokenizer, train, valid, monkeypatch):
    """What brings numbers to the host is called as often in a step of four micro-batches as in one of one."""
    run, calls = make_run(copy.deepcopy(tiny), tokenizer, train, valid, batch_size=2), []
    batches = [run.collate([train[i], train[i + 1]]) for i in (0, 2, 4, 6)]

    def counting(name, original):
        return lambda *args, **more: (calls.append(name), original(*args, **more))[1]

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    counts = []
    for micro_batches in (batches[:1], batches):
        calls.clear()
        script.train_step(run, micro_batches)
        counts.append(list(calls))
    assert counts[0] == counts[1] and "tolist" in counts[0]


def test_a_micro_batch_that_sharing_left_empty_costs_nothing(tiny, tokenizer, train, valid):
    run = make_run(copy.deepcopy(tiny), tokenizer, train, valid, batch_size=1, grad_accum_steps=4)
    calls = []
    run.model.text_model.register_forward_pre_hook(lambda *args: calls.append(1))
    four = [i for i, example in enumerate(train) if example.picture == train[1].picture]
    batches = [run.collate([train[i] for i in numbers]) for numbers in ([], [], four[:2], four[2:])]
    loss, _, tokens = script.train_step(run, batches)
    assert len(calls) == 2 and tokens == sum(len(train[i].answer_ids) for i in four)
    expected = sum(plain_losses(tiny, tokenizer, [train[i] for i in four], train.pictures)) / tokens
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_validation_holds_the_keys_and_values_of_one_batch(tiny, tokenizer, train, valid):
    run = make_run(tiny, tokenizer, train, valid, batch_size=1)
    caches, alive = [], []

    def before(module, args, inputs):
        alive.append(sum(cache() is not None for cache in caches))

    def after(module, args, inputs, out):
        caches.append(weakref.ref(out.past_key_values))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "whole_rows", lambda dataset, *args: [[i] for i in range(len(dataset))])
        patch.setattr(tiny, "decode", lambda token, *args: [[[token.item()]]])
        tiny.text_model.register_forward_pre_hook(before, with_kwargs=True)
        tiny.text_model.register_forward_hook(after, with_kwargs=True)
        script.evaluate(run)
    assert alive == [0] * len(valid)


def test_validation_loss_is_the_mean_over_answer_tokens_whatever_the_batch(tiny, tokenizer, train, valid):
    with torch.no_grad():
        total = sum(plain_losses(tiny, tokenizer, valid.examples, valid.pictures)).item()
    expected = total / sum(len(example.answer_ids) for example in valid.examples)
    state = torch.get_rng_state()
    for batch_size in (1, 2, 50):
        run = make_run(tiny, tokenizer, train, valid, batch_size=batch_size)
        assert script.evaluate(run)[0] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_answers_are_those_of_answer_question(tiny, tokenizer, train, valid):
    run = make_run(tiny, tokenizer, train, valid, batch_size=1)
    expected = {}
    for example in valid.examples:
        embeds = tiny.encode_image([pixels_of(valid.pictures[example.picture], tiny.vision_encoder)])
        expected[example.place] = tiny.answer_question(
            embeds, example.question, tokenizer, max_new_tokens=script.MAX_NEW_TOKENS
        )
    assert script.evaluate(run)[1] == expected
    run.constants.valid_answers = 3
    _, answers = script.evaluate(run)
    assert answers.items() <= expected.items() and len(answers) == 3
    run.constants.valid_answers = 0
    assert script.evaluate(run)[1] == {} and script.accuracy(valid, {}) is None


def test_validation_reads_a_row_once_for_its_loss_and_its_answers(tiny, tokenizer, train, valid):
    run = make_run(tiny, tokenizer, train, valid, batch_size=1)
    read = []
    tiny.text_model.transformer.h[0].register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    script.evaluate(run)
    rows = [tokens for tokens in read if tokens > tiny.config.image_tokens]
    assert len(rows) == 1 and len(read) > 1  # the three pictures lie in one batch; then token by token


@pytest.mark.parametrize(("processes", "times"), [(1, 7), (2, 1)])
def test_validation_asks_other_processes_to_stop_now_and_then(tiny, tokenizer, train, valid, processes, times):
    run, asked = make_run(tiny, tokenizer, train, valid, batch_size=1, valid_answers=0), []
    run.stop.check = lambda: asked.append(1)
    run.accelerator = SimpleNamespace(
        num_processes=processes, process_index=0, is_main_process=True, device=run.accelerator.device
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "whole_rows", lambda dataset, *args: [[i] for i in range(len(dataset))])
        script.evaluate(run)
    assert len(asked) == times


def test_what_the_loss_does_not_reach_comes_out_bit_for_bit(tiny, tokenizer, train, valid):
    model = tiny.bfloat16()
    before = copy.deepcopy(model.state_dict())
    run = make_run(model, tokenizer, train, valid, batch_size=4, learning_rate=1e-2, weight_decay=0.5)
    script.train_epoch(run)
    for name, tensor in model.state_dict().items():
        if name.startswith("text_model."):
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_a_step_that_is_not_finite_is_not_applied(tiny, tokenizer, train, valid, capsys):
    run = make_run(tiny, tokenizer, train, valid, batch_size=4)
    before = copy.deepcopy(tiny.state_dict())
    poison = iter([False, True, False, True, True, True])
    embed = script.image_embeds

    def poisoned(*args):
        embeds = embed(*args)
        return embeds * math.nan if next(poison) else embeds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "image_embeds", poisoned)
        script.train_epoch(run)  # 5 steps: the second, fourth and fifth fail
        out = capsys.readouterr().err
        assert out.count("Step not applied: loss nan") == 3
        assert "train.jsonl:" in out
        assert all(tensor.isfinite().all() for tensor in tiny.state_dict().values())
        assert any(not torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
        assert math.isfinite(run.progress.loss_sum)
        patch.setattr(script, "image_embeds", lambda *args: embed(*args) * math.nan)
        run.progress.step = 0
        with pytest.raises(InputError, match="3 steps in a row without a finite loss"):
            script.train_epoch(run)


def losses_in(dtype, tiny, tokenizer, train, valid, folder, optimizer=None):
    """The mean training loss of the last of twelve epochs at a rate whose steps bfloat16 rounds away."""
    model = copy.deepcopy(tiny).to(dtype)
    run = make_run(model, tokenizer, train, valid, folder, batch_size=4, learning_rate=3e-5, epochs=12)
    if optimizer:
        run.optimizer = optimizer(model.text_model.parameters(), lr=3e-5, betas=run.constants.betas)
    for run.progress.epoch in range(1, 13):
        run.progress.step, run.progress.loss_sum, run.progress.tokens = 0, 0.0, 0
        script.train_epoch(run)
    return run.progress.loss_sum / run.progress.tokens


def test_bfloat16_trains_as_float32_does(tiny, tokenizer, train, valid, tmp_path):
    tiny.bfloat16().float()  # the same start for both
    reference = losses_in(torch.float32, tiny, tokenizer, train, valid, tmp_path)
    assert losses_in(torch.bfloat16, tiny, tokenizer, train, valid, tmp_path) == pytest.approx(reference, rel=0.03)
    plain = losses_in(torch.bfloat16, tiny, tokenizer, train, valid, tmp_path, torch.optim.AdamW)
    print(reference, plain)
    assert plain > 1.03 * reference, "plain AdamW would pass: this test shows nothing"
