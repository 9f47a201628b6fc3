"""What a model makes of examples: the loss is the mean over answer tokens, the answers are answer_question's."""

import weakref
from functools import partial

import pytest
import torch

from moondream2.evaluation import accuracy_of, draw_questions, evaluate, most_new_tokens
from moondream2.modeling_moondream2 import Answer
from moondream2.pictures import pixels_of
from moondream2.rows import whole_rows
from tests.shared import dataset, draw_picture, layer_out, write_lines
from tests.test_training import plain_losses


@pytest.fixture
def valid(data, tokenizer):
    return dataset(data / "valid.jsonl", tokenizer)


def batches_of(model, tokenizer, valid, batch_size, multiple=1):
    rows = whole_rows(valid.examples, 1 + model.config.image_tokens, batch_size, 2048 - 82)
    return map(partial(layer_out(model, tokenizer, valid), multiple=multiple), rows)


def test_the_loss_is_the_mean_over_answer_tokens_whatever_the_batch(tiny, tokenizer, valid):
    with torch.no_grad():
        total = sum(plain_losses(tiny, tokenizer, valid.examples, valid.pictures)).item()
    expected = total / sum(len(example.answer_ids) for example in valid.examples)
    state = torch.get_rng_state()
    for batch_size in (1, 2, 50):
        assert evaluate(tiny, tokenizer, batches_of(tiny, tokenizer, valid, batch_size))[0] == pytest.approx(
            expected, rel=1e-5
        )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("batch_size", "multiple"), [(1, 1), (4, 1), (4, 64)])
def test_answers_are_those_of_answer_questions(tiny, tokenizer, valid, batch_size, multiple):
    """With their probabilities, though they come out of the pass that gave the loss, and however rows are padded."""
    expected, tiny.generation_config.max_new_tokens = {}, 20
    for example in valid.examples:
        embeds = tiny.encode_image([pixels_of(valid.pictures[example.picture], tiny.vision_encoder.preprocess)])
        answers = tiny.answer_questions(embeds, [[example.question]], tokenizer, return_probabilities=True)
        expected[example.key] = answers[0][0]
    for most in (1000, 3, 0):
        asked = draw_questions(valid, most, 0)
        batches = batches_of(tiny, tokenizer, valid, batch_size, multiple)
        _, answers = evaluate(tiny, tokenizer, batches, asked)
        assert answers.keys() == asked and len(answers) == min(most, len(valid))
        for key, answer in answers.items():
            assert (answer.text, answer.is_cut) == (expected[key].text, expected[key].is_cut)
            assert answer.probability == pytest.approx(expected[key].probability, rel=1e-4)
    assert accuracy_of(valid, {}) is None


def test_an_answer_may_be_longer_than_the_longest_of_the_data(folder_of, tokenizer):
    short, long = (folder_of(answer="word " * words) for words in (3, 200))
    assert most_new_tokens([short, short], 2048 - 82) == 64
    longest = len(long[0].answer_ids)
    assert longest > 200
    assert most_new_tokens([short, long], 2048 - 82) == most_new_tokens([long, short], 2048 - 82) == longest * 5 // 4
    assert most_new_tokens([short, long], longest + 1) == longest + 1


@pytest.fixture
def folder_of(tmp_path, tokenizer):
    """A dataset of one line with such an answer."""
    draw_picture(tmp_path / "a.png", 1)

    def made(answer):
        line = {"image_path": "a.png", "question": "Q", "answer": answer}
        return dataset(write_lines(tmp_path / "lines.jsonl", [line]), tokenizer)

    return made


def test_any_of_several_answers_is_right(folder_of):
    data = folder_of(answer=["no", "yes", "Yes", "maybe"])
    for text, share in (("YES.", 1), ("no", 1), ("Maybe", 1), ("never", 0)):
        assert accuracy_of(data, {data[0].key: Answer(text, 1.0, False)}) == share


def test_the_questions_that_are_asked_are_those_of_the_seed(valid):
    assert draw_questions(valid, 3, 0) == draw_questions(valid, 3, 0) != draw_questions(valid, 3, 1)


def test_accuracy_is_of_the_questions_that_were_asked(valid):
    texts = valid[0].answer.upper(), "something else", valid[2].answer
    answers = {example.key: Answer(text, 1.0, False) for example, text in zip(valid, texts, strict=False)}
    assert accuracy_of(valid, answers) == pytest.approx(2 / 3)


def test_a_row_is_read_once_for_its_loss_and_its_answers(tiny, tokenizer, valid):
    read = []
    tiny.text_model.transformer.h[0].register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    evaluate(tiny, tokenizer, batches_of(tiny, tokenizer, valid, 50), draw_questions(valid, 1000, 0))
    rows = [tokens for tokens in read if tokens > tiny.config.image_tokens]
    assert len(rows) == 1 and len(read) > 1  # the three pictures lie in one batch; then token by token


def test_the_keys_and_values_of_one_batch_are_held(tiny, tokenizer, valid, monkeypatch):
    caches, alive = [], []

    def before(module, args, inputs):
        alive.append(sum(cache() is not None for cache in caches))

    def after(module, args, inputs, out):
        caches.append(weakref.ref(out.past_key_values))

    def first_tokens(logits, *args, **kwargs):
        return [[([each], 1.0) for each in row] for row in logits.argmax(-1).tolist()]

    monkeypatch.setattr(tiny, "decode", first_tokens)
    tiny.text_model.register_forward_pre_hook(before, with_kwargs=True)
    tiny.text_model.register_forward_hook(after, with_kwargs=True)
    load = layer_out(tiny, tokenizer, valid)
    evaluate(tiny, tokenizer, (load([[example]]) for example in valid), draw_questions(valid, 1000, 0))
    assert alive == [0] * len(valid)


def test_what_is_compiled_for_training_is_not_run(tiny, tokenizer, valid):
    for layer in tiny.text_model.layers:
        layer.compile(backend=lambda *arguments: pytest.fail("compiled"))
    evaluate(tiny, tokenizer, batches_of(tiny, tokenizer, valid, 4), {valid[0].key})


def test_in_bfloat16_the_loss_is_that_of_its_logits_in_float32(tiny, tokenizer, valid):
    logits, targets = [], [token for example in valid for token in example.answer_ids]
    tiny.bfloat16().text_model.lm_head.linear.register_forward_hook(lambda module, args, out: logits.append(out))
    batches = (layer_out(tiny, tokenizer, valid)([[example]]) for example in valid)
    loss, _ = evaluate(tiny, tokenizer, batches)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits).double(), torch.tensor(targets))
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_where_nothing_is_asked_no_keys_and_values_are_kept(tiny, tokenizer, valid):
    kept = []
    tiny.text_model.register_forward_hook(lambda module, args, out: kept.append(out.past_key_values))
    evaluate(tiny, tokenizer, batches_of(tiny, tokenizer, valid, 50))
    assert kept == [None]
