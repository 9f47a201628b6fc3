"""The model behind the Auto classes: loading, saving, asking. Runs on every transformers release that is supported."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from moondream2 import modeling_moondream2
from moondream2.modeling_moondream2 import (
    RoomyCache,
    lay_out_rows,
    preprocess,
    prompt_text,
    row_mask,
    upright_rgb,
)

TINY = Path(__file__).parent / "tiny_moondream2"
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"  # its name in from_pretrained


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, **{DTYPE: torch.float32}).eval()


def picture(size=(300, 200), colour="teal"):
    image = Image.new("RGB", size, colour)
    image.paste("white", (size[0] // 3, 10, size[0] // 2, size[1] // 2))
    return image


def test_the_hubs_own_config_is_the_release():
    hub = {"model_type": "moondream1", "text_config": {"model_type": "phi"}, "architectures": ["Moondream"]}
    assert modeling_moondream2.MoondreamConfig.from_dict(hub).to_diff_dict().keys() >= {"model_type"}
    with torch.device("meta"):
        model = modeling_moondream2.Moondream(modeling_moondream2.MoondreamConfig.from_dict(hub))
    assert sum(p.numel() for p in model.parameters()) == 1_867_982_709


def test_every_weight_and_buffer_is_the_files(model):
    from safetensors.torch import load_file

    weights = load_file(TINY / "model.safetensors")
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].float()), name


def test_encode_image_takes_a_picture_a_list_or_a_tensor(model):
    pictures = [picture(), picture((640, 480)), picture((600, 200), "brown")]
    listed = model.encode_image(pictures)
    assert listed.shape == (3, model.config.image_tokens, model.config.text_config.hidden_size)
    for each, expected in zip(pictures, listed, strict=True):
        torch.testing.assert_close(model.encode_image(each)[0], expected, atol=1e-5, rtol=1e-5)
        pixels = model.vision_encoder.preprocess(each)[None]
        torch.testing.assert_close(model.encode_image(pixels)[0], expected, atol=1e-5, rtol=1e-5)
    assert not listed.requires_grad


def naive_answer(model, tokenizer, image_embeds, prompt, tokens):
    """Greedy decoding that computes everything anew for each token; the text, and the product of a plain softmax."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    answer, probability = [], 1.0
    for _ in range(tokens):
        embeds = model.get_input_embeddings()(torch.tensor([ids + answer]))
        embeds = torch.cat([embeds[:, :1], image_embeds, embeds[:, 1:]], dim=1)
        with torch.no_grad():
            chances = model.text_model(inputs_embeds=embeds).logits[0, -1].softmax(0)
        token = chances.argmax().item()
        probability *= chances[token].item()
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    return tokenizer.decode(answer).strip(), probability


QUESTIONS = [["What is it?", "How many people are on the crossing?", "Why?"], ["Is a car waiting?"], ["And?", "Where?"]]


def test_answers_are_those_of_naive_decoding(model, tokenizer):
    embeds = model.encode_image([picture(), picture((640, 480), "red"), picture((200, 300), "navy")])
    expected = [
        [naive_answer(model, tokenizer, embeds[r : r + 1], prompt_text(q), 24) for q in row]
        for r, row in enumerate(QUESTIONS)
    ]
    texts = [[text for text, _ in row] for row in expected]
    assert any(len(text) > 3 for row in texts for text in row)
    assert model.answer_questions(embeds, QUESTIONS, tokenizer, max_new_tokens=24) == texts
    one = model.answer_question(embeds[:1], QUESTIONS[0][1], tokenizer, max_new_tokens=24)
    assert one == texts[0][1]


@pytest.mark.parametrize("tokens", [24, 2])
def test_an_answers_probability_is_that_of_all_its_tokens(model, tokenizer, tokens):
    """The end included, in a batch as alone; of an answer that was cut, of those that it has."""
    embeds = model.encode_image([picture(), picture((640, 480), "red"), picture((200, 300), "navy")])
    options = {"max_new_tokens": tokens, "return_probabilities": True}
    together = model.answer_questions(embeds, QUESTIONS, tokenizer, **options)
    assert {answer.is_cut for row in together for answer in row} == {tokens == 2}
    for r, (row, answers) in enumerate(zip(QUESTIONS, together, strict=True)):
        for question, answer in zip(row, answers, strict=True):
            alone = model.answer_questions(embeds[r : r + 1], [[question]], tokenizer, **options)[0][0]
            text, probability = naive_answer(model, tokenizer, embeds[r : r + 1], prompt_text(question), tokens)
            assert answer.text == alone.text == text and answer.is_cut == alone.is_cut
            assert answer.probability == pytest.approx(probability, rel=1e-4)
            assert alone.probability == pytest.approx(probability, rel=1e-4)


def test_an_answer_ends_at_the_last_position(model, tokenizer):
    prefix, ids = 1 + model.config.image_tokens, tokenizer("Why?", add_special_tokens=False).input_ids
    model.config.text_config.max_position_embeddings = prefix + len(ids) + 5
    ((answer, _),) = model.generate_ids(model.encode_image(picture()), [[ids]], bos=0, eos=-2, max_new_tokens=50)[0]
    assert len(answer) == 6  # its last token is never read


def test_no_special_token_comes_out_of_a_question(model, tokenizer, monkeypatch):
    asked, decode = [], model.generate_ids
    monkeypatch.setattr(model, "generate_ids", lambda *arguments: (asked.append(arguments[1]), decode(*arguments))[1])
    model.answer_question(model.encode_image(picture()), "a<|endoftext|>b", tokenizer, max_new_tokens=1)
    assert tokenizer.eos_token_id not in asked[0][0][0]
    assert tokenizer.decode(asked[0][0][0]) == prompt_text("a<|endoftext|>b")


def test_batch_answer_and_caption(model, tokenizer):
    pictures, questions = [picture(), picture(colour="red")], ["What is it?", "How many people are on the crossing?"]
    expected = [
        model.answer_question(model.encode_image(image), question, tokenizer, max_new_tokens=24)
        for image, question in zip(pictures, questions, strict=True)
    ]
    assert model.batch_answer(pictures, questions, tokenizer, max_new_tokens=24) == expected
    short = naive_answer(model, tokenizer, model.encode_image(pictures[0]), "\n\nShort caption:", 16)
    assert model.caption(pictures[:1], tokenizer, length="short", max_new_tokens=16) == [short[0]]


def test_answers_are_no_longer_than_asked_for(model, tokenizer, monkeypatch):
    """Each way to ask hands on how many tokens an answer may have."""
    most, generate = [], model.generate_ids
    monkeypatch.setattr(model, "generate_ids", lambda *arguments: (most.append(arguments[-1]), generate(*arguments))[1])
    embeds = model.encode_image(picture())
    model.answer_question(embeds, "Why?", tokenizer, max_new_tokens=1)
    model.answer_questions(embeds, [["Why?"]], tokenizer, max_new_tokens=2)
    model.batch_answer([picture()], ["Why?"], tokenizer, max_new_tokens=3)
    model.caption([picture()], tokenizer, max_new_tokens=4)
    model.query(picture(), "Why?", tokenizer, 5)
    assert most == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# The release's methods, and transformers' own
# ---------------------------------------------------------------------------------------------------------------------

QUESTION = QUESTIONS[0][1]
PROMPT = f"<image>{prompt_text(QUESTION)}"


def embeds_of(model, tokenizer, before, image_embeds, after):
    """BOS, a text, a picture and a text as embeddings, put together by hand."""
    ids = [[tokenizer.bos_token_id, *tokenizer(before).input_ids], tokenizer(after).input_ids]
    first, last = (model.text_model.transformer.embd.wte(torch.tensor([each], dtype=torch.long)) for each in ids)
    return torch.cat([first, image_embeds, last], dim=1)


def test_a_prompt_becomes_embeddings_with_the_picture_where_it_stands(model, tokenizer):
    image = model.encode_image(picture())
    for before in ("", "Look: "):
        expected = embeds_of(model, tokenizer, before, image, "\n\nWhy?")
        assert torch.equal(model.input_embeds(f"{before}<image>\n\nWhy?", image, tokenizer), expected)
    assert torch.equal(model.input_embeds("Why?", image, tokenizer)[:, 1:], expected[:, -len(tokenizer("Why?")[0]) :])


def test_what_a_question_says_is_text_in_a_prompt_too(model, tokenizer):
    image = model.encode_image(picture())
    embeds = model.input_embeds("<image> <image><|endoftext|>", image, tokenizer)
    ids = tokenizer(" <image><|endoftext|>", split_special_tokens=True).input_ids
    assert tokenizer.eos_token_id not in ids and embeds.shape[1] == 1 + image.shape[1] + len(ids)


def test_logits_behind_a_prompt_are_the_chances_of_its_answers(model, tokenizer):
    """As scripts compare " Yes" with " No"."""
    image = model.encode_image(picture())
    with torch.no_grad():
        logits = model.text_model(inputs_embeds=model.input_embeds(PROMPT, image, tokenizer)).logits[0, -1]
    ids = tokenizer(prompt_text(QUESTION)).input_ids
    (((_, probability),),) = model.generate_ids(image, [[ids]], bos=0, eos=0, max_new_tokens=1)
    assert logits.softmax(0).max().item() == pytest.approx(probability, rel=1e-4)


ARGUMENTS = [
    {"num_beams": 3},
    {"do_sample": True, "temperature": 1.7},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 2, "length_penalty": -3.0},
    {"do_sample": False},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_each_way_to_ask_hands_on_what_transformers_generate_takes(model, tokenizer, arguments):
    image, end = model.encode_image(picture()), tokenizer.eos_token_id
    arguments = {"max_new_tokens": 12, **arguments}

    def expected(after, most=12):
        torch.manual_seed(1)
        ids = model.text_model.generate(
            inputs_embeds=embeds_of(model, tokenizer, "", image, after),
            attention_mask=torch.ones(1, 1 + image.shape[1] + len(tokenizer(after).input_ids)),
            eos_token_id=end,
            pad_token_id=end,
            **arguments,
        )
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    def got(method, *inputs):
        torch.manual_seed(1)
        return getattr(model, method)(*inputs, tokenizer, **arguments)

    answer = expected(prompt_text(QUESTION))
    assert got("generate", image, PROMPT) == [answer]
    assert got("answer_question", image, QUESTION) == answer.strip()
    assert got("batch_answer", [picture()], [QUESTION]) == [answer.strip()]
    assert got("caption", [picture()]) == [expected("\n\nCaption:").strip()]
    if arguments.get("do_sample") is False:
        assert answer.strip() == naive_answer(model, tokenizer, image, prompt_text(QUESTION), 12)[0]


def test_generate_gives_a_list_of_texts(model, tokenizer):
    image = model.encode_image(picture())
    assert len(set(model.generate(image, PROMPT, tokenizer, num_beams=3, num_return_sequences=3))) == 3
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    (text,) = model.generate(image, PROMPT, tokenizer, eos_token_id=-1)
    assert len(passes) == 128 and text.startswith(" ")


def test_without_a_prompt_generate_is_transformers_own(model):
    ids = torch.tensor([[0, 5, 6, 7]])
    got = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(got, model.text_model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert got[0, :4].tolist() == ids[0].tolist() and got.shape == (1, 9)


def test_texts_of_a_padded_batch_are_those_alone(model):
    texts, options = [[5, 6, 7, 8], [9, 10]], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batch, mask = torch.tensor([texts[0], [0, 0, *texts[1]]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    together = model.text_model.generate(batch, attention_mask=mask, **options)[:, 4:].tolist()
    assert together == [model.text_model.generate(torch.tensor([each]), **options)[0, -6:].tolist() for each in texts]


def test_an_answer_is_streamed_and_put_into_a_queue(model, tokenizer):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append(None)

    streamer, queue, image = Streamer(), Queue(), model.encode_image(picture())
    answer = model.answer_question(image, QUESTION, tokenizer, "", queue, 24)
    assert queue.get_nowait() == answer
    model.answer_question(image, QUESTION, tokenizer, streamer=streamer, max_new_tokens=24)
    *ids, last = streamer.ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == answer and last is None


def test_a_question_about_a_picture_is_asked_in_one_line(model, tokenizer):
    expected, probability = naive_answer(model, tokenizer, model.encode_image(picture()), prompt_text(QUESTION), 24)
    for image in (picture(), model.encode_image(picture())):
        answer = model.query(image, QUESTION)
        assert answer == {"answer": expected, "probability": pytest.approx(probability, rel=1e-4)}
    assert model.caption(picture()) == model.caption([picture()], tokenizer)


@pytest.mark.parametrize(("stored", "tokens"), [(3, 3), (None, 256)])
def test_an_answers_length_is_stored_with_the_model(model, tokenizer, tmp_path, stored, tokens):
    model.generation_config.max_new_tokens = stored
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    image = again.encode_image(picture())
    ((answer, _),) = again.generate_ids(image, [[[5, 6, 7]]], bos=0, eos=-2)[0]
    assert len(answer) == tokens
    short, by_generate = (again.answer_question(image, QUESTION, tokenizer, **each) for each in ({}, {"num_beams": 1}))
    assert short == by_generate


def test_a_new_token_costs_one_tokens_work(model, tokenizer):
    seen = []
    model.text_model.transformer.h[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
    ids = model.generate_ids(model.encode_image(picture()), [[[5, 6, 7], [8, 9]]], bos=0, eos=-1, max_new_tokens=4)
    assert [len(answer) for answer, _ in ids[0]] == [4, 4]
    assert [tuple(each) for each in seen] == [(1, 1 + model.config.image_tokens + 5), (1, 2), (1, 2), (1, 2)]


def test_decoding_copies_what_was_read_only_to_make_room(model, monkeypatch):
    """70 tokens for each of two questions; a GPU meets few lengths of keys, for which it has its kernels ready."""
    met, update = [], RoomyCache.update

    def noting(cache, k, v, layer):
        found = update(cache, k, v, layer)
        if layer == 0:
            met.append(found)
        return found

    monkeypatch.setattr(RoomyCache, "update", noting)
    image, read = model.encode_image(picture()), 1 + model.config.image_tokens + 5
    model.generate_ids(image, [[[5, 6, 7], [8, 9]]], bos=0, eos=-1, max_new_tokens=70)
    lengths = [keys.shape[2] for keys, _ in met]
    assert lengths == [read, *(-(-(read + 2 * step) // 64) * 64 for step in range(1, 70))]
    for kept in zip(*met, strict=True):  # its keys, its values
        copies = 1 + sum(before.data_ptr() != after.data_ptr() for before, after in pairwise(kept))
        assert copies == len(set(lengths)) <= 4


def test_gradient_checkpointing_changes_no_gradient(model):
    rows = lay_out_rows([[([5, 6], [7]), ([8], [9])]], bos=0, image_tokens=model.config.image_tokens)
    labels = torch.where(rows["document_ids"] > 0, 7, -100)
    inputs = {
        "input_ids": rows["input_ids"],
        "image_embeds": model.encode_image(picture()),
        "position_ids": rows["position_ids"],
        "attention_mask": row_mask(rows["document_ids"], 1 + model.config.image_tokens),
        "labels": labels,
    }
    gradients = []
    calls = []
    model.text_model.transformer.h[0].ln.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model.train().zero_grad()
        model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.text_model.named_parameters()})
    assert len(calls) == 3  # once without, twice with
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_pictures_are_upright_rgb():
    assert preprocess(picture((300, 200))).shape == (3, 378, 378)
    turned = Image.new("RGB", (40, 20), "black")
    turned.paste("white", (0, 0, 10, 20))  # the left edge, which orientation 6 puts on top
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    upright = upright_rgb(turned)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 2)) == (255, 255, 255) and upright.getpixel((10, 30)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 128, (128, 128, 128)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_any_mode_becomes_what_a_person_sees(mode, colour, expected):
    got = upright_rgb(Image.new(mode, (4, 3), colour)).getpixel((1, 1))
    assert all(abs(a - b) <= 1 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "i4"])
@pytest.mark.parametrize(
    ("brightest", "white"),
    [(0, 255), (15, 255), (255, 255), (256, 1023), (1023, 1023), (1024, 4095), (4095, 4095), (4096, 16383)]
    + [(16383, 16383), (16384, 65535), (65535, 65535)],
)
def test_grey_of_more_than_8_bits_is_scaled_by_the_bits_that_hold_its_brightest(dtype, brightest, white):
    values = np.linspace(0, brightest, 60).astype(dtype).reshape(6, 10)
    got = np.asarray(upright_rgb(Image.fromarray(values)))
    assert got.tolist() == [[[int(value) * 255 // white] * 3 for value in row] for row in values]


def test_grey_of_16_bits_whose_range_is_full_is_what_its_high_byte_says():
    values = np.arange(65536, dtype="u2").reshape(256, 256)
    assert np.array_equal(np.asarray(upright_rgb(Image.fromarray(values)))[..., 0], values // 257)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([-5, 0, 100, 255], "i4"), [0, 0, 100, 255]),
        (np.array([-5, -1], "i4"), [0, 0]),
        (np.array([0, 2**19, 2**20 - 1], "i4"), [0, 127, 255]),
        (np.array([-(2**31), 2**30, 2**31 - 1], "i4"), [0, 127, 255]),
        (np.array([0.0, 0.2, 0.5, 1.0], "f4"), [0, 51, 128, 255]),
        (np.array([0.0, 0.9, 1.1, 254.6, 300.0], "f4"), [0, 1, 1, 255, 255]),
        (np.array([-1.0, NAN, 0.2, INF, -INF], "f4"), [0, 0, 51, 255, 0]),
        (np.array([-3e38, 100, NAN, 3e38, INF], "f4"), [0, 100, 0, 255, 255]),
        (np.array([NAN, NAN], "f4"), [0, 0]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_8_bits_do_not_hold(values, expected):
    got = np.asarray(upright_rgb(Image.fromarray(values[None])))
    assert got[0].tolist() == [[value] * 3 for value in expected]


def test_a_transparent_palette_is_on_white():
    image = Image.new("P", (4, 3), 0)
    image.putpalette([255, 0, 0])
    image.info["transparency"] = 0
    assert upright_rgb(image).getpixel((0, 0)) == (255, 255, 255)


# ---------------------------------------------------------------------------------------------------------------------
# As any model of transformers
# ---------------------------------------------------------------------------------------------------------------------


def test_standard_arguments_give_standard_results(model):
    ids, text_model = torch.arange(5, 45).view(2, 20), model.text_model
    given = []
    for block in text_model.transformer.h:
        block.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    out = model(input_ids=ids, labels=ids, output_hidden_states=True, output_attentions=None, return_dict=None)
    assert out.logits.shape == (2, 20, model.config.text_config.vocab_size)
    assert all(torch.equal(*each) for each in zip(out.hidden_states, given, strict=False))
    assert len(out.hidden_states) == 1 + len(given)
    assert torch.equal(text_model.lm_head.linear(out.hidden_states[-1]), out.logits)
    loss, logits = model(input_ids=ids, labels=ids, return_dict=False)
    assert loss == out.loss and torch.equal(logits, out.logits)
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=3).logits, out.logits[:, -3:])


@pytest.mark.parametrize(
    ("asked_for", "is_run"), [("eager", "eager"), ("sdpa", "sdpa"), ("flash_attention_2", "sdpa"), (None, "sdpa")]
)
def test_attention_is_the_one_that_was_asked_for(model, tokenizer, monkeypatch, asked_for, is_run):
    """flash_attention_2 is one of the kernels of SDPA, torch's own: nothing has to be installed for it."""
    options = {"attn_implementation": asked_for} if asked_for else {}
    asked = AutoModelForCausalLM.from_pretrained(TINY, **options, **{DTYPE: torch.float32}).eval()
    assert asked.config._attn_implementation == asked.text_model.config._attn_implementation == is_run
    embeds = model.encode_image([picture(), picture((640, 480), "red"), picture((200, 300), "navy")])
    expected = model.answer_questions(embeds, QUESTIONS, tokenizer, 24, return_probabilities=True)
    ids, mask = torch.arange(5, 45).view(2, 20), torch.ones(2, 20)
    mask[0, :7] = 0
    logits = [model(input_ids=ids, attention_mask=each).logits for each in (mask, None)]

    attention, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), attention(*a, **k))[1])
    for row, answers in zip(expected, asked.answer_questions(embeds, QUESTIONS, tokenizer, 24, True), strict=True):
        assert [answer.text for answer in answers] == [answer.text for answer in row]
        assert [a.probability for a in answers] == pytest.approx([a.probability for a in row], rel=1e-4)
    for each, right in zip((mask, None), logits, strict=True):
        torch.testing.assert_close(asked(input_ids=ids, attention_mask=each).logits, right, atol=1e-4, rtol=1e-4)
    assert bool(calls) == (is_run == "sdpa")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_may_be_given_in_any_form(implementation):
    """Padding alone, who sees whom, or what is added to scores."""
    options = {"attn_implementation": implementation, DTYPE: torch.float32}
    model, ids = AutoModelForCausalLM.from_pretrained(TINY, **options).eval(), torch.arange(5, 25).view(1, 20)
    padding = torch.arange(20)[None] >= 6
    sees = torch.ones(20, 20, dtype=torch.bool).tril() & (padding[0] | torch.eye(20, dtype=torch.bool))
    added = torch.zeros(20, 20).masked_fill(~sees, float("-inf"))
    given = {"input_ids": ids, "position_ids": torch.arange(20)[None]}
    masks = None, padding.long(), sees[None, None], added[None, None]
    unmasked, *logits = (model(**given, attention_mask=mask).logits[:, 6:] for mask in masks)
    for each in logits:
        torch.testing.assert_close(each, logits[0], atol=1e-5, rtol=1e-5)
        assert (each - unmasked).abs().max() > 0.1


def test_settings_of_any_configuration_are_taken():
    model = AutoModelForCausalLM.from_pretrained(TINY, pad_token_id=7, bos_token_id=0, eos_token_id=0, use_cache=False)
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.use_cache) == (7, 0, 0, False)
    with pytest.raises(TypeError, match="pad_tokken"):
        AutoModelForCausalLM.from_pretrained(TINY, pad_tokken_id=7)


def test_threads_that_ask_at_once_are_answered_as_alone(model, tokenizer):
    def ask(question, **arguments):
        return model.answer_question(model.encode_image(picture()), question, tokenizer, max_new_tokens=12, **arguments)

    questions = [question for row in QUESTIONS for question in row]
    alone = [ask(question) for question in questions]
    assert len(set(alone)) > 2
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, questions)) == alone
        assert list(pool.map(lambda question: ask(question, num_beams=1), questions)) == alone


def test_the_encoder_can_be_exported(model):
    for image in (picture(), picture((640, 480))):
        pixels = model.vision_encoder.preprocess(image)[None]
        exported = torch.export.export(model.vision_encoder, (pixels,)).module()
        torch.testing.assert_close(exported(pixels), model.encode_image(image))


# ---------------------------------------------------------------------------------------------------------------------
# Precision and memory
# ---------------------------------------------------------------------------------------------------------------------


def test_in_bfloat16_positions_are_told_apart(model):
    """The layers of a bfloat16 model are given angles as exact as float32 is: positions 700 and 701 are different."""
    given, config = [], model.config.text_config
    layer = model.bfloat16().text_model.transformer.h[-1]
    layer.register_forward_hook(lambda module, args, out: given.append(args[1:3]))
    positions = torch.tensor([[0, 700, 701, 2047]])
    model.text_model(input_ids=torch.tensor([[5, 6, 7, 8]]), position_ids=positions)
    powers = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
    angles = positions[:, None, :, None] * config.rotary_theta**-powers
    cos, sin = angles.cos(), angles.sin()
    for got, expected in zip(given[0], (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=5e-4, rtol=0)


def test_in_bfloat16_the_loss_is_that_of_its_logits_in_float32(model):
    ids = torch.arange(5, 45)[None]
    out = model.bfloat16()(input_ids=ids, labels=ids)
    expected = F.cross_entropy(out.logits[0, :-1].double(), ids[0, 1:])
    assert out.loss.dtype == torch.float32 and out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def kept_for_the_backward_pass(module, *inputs):
    """The bytes of each memory that a module keeps until then, without its parameters and inputs."""
    mine = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *inputs) if torch.is_tensor(each)}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(*inputs)
        return out, [size for place, size in kept.items() if place not in mine]


class GeluLinear(torch.autograd.Function):
    """linear(gelu(x)) whose backward pass is written out: nothing is left to autograd."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x, approximate="tanh")
        grad = grad.flatten(0, -2)
        return grad_x, grad.T @ F.gelu(x, approximate="tanh").flatten(0, -2), grad.sum(0)


def gradients(f, module, x):
    """What f(x) is, and the gradients of its sum's square by x and the module's parameters."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = f(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize("shape", [(2, 50), (100,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gelu_computed_again_gives_the_same_bits(model, dtype, shape):
    mlp, x = model.text_model.transformer.h[0].mlp.to(dtype), torch.randn(*shape, 192).to(dtype)
    got = gradients(mlp, mlp, x)
    expected = gradients(lambda x: GeluLinear.apply(mlp.fc1(x), mlp.fc2.weight, mlp.fc2.bias), mlp, x)
    checkpointed = gradients(lambda x: checkpoint(mlp, x, use_reentrant=False), mlp, x)
    for each, right, again in zip(got, expected, checkpointed, strict=True):
        assert torch.equal(each, right) and torch.equal(again, right)


def bytes_left(f):
    """What f returns, and the bytes that it allocated and did not free."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = f()
    return out, sum(event.self_cpu_memory_usage for event in profile.events())


def test_an_mlp_keeps_what_goes_into_its_activation_and_not_what_comes_out(model):
    config, x = model.config.text_config, torch.randn(1, 50, 192, requires_grad=True)
    mlp = model.text_model.transformer.h[0].mlp
    _, left = bytes_left(lambda: mlp(x))
    assert left == 50 * (config.intermediate_size + config.hidden_size) * 4  # fc1's output, and fc2's
    _, left = bytes_left(lambda: checkpoint(mlp, x, use_reentrant=False, preserve_rng_state=False))
    assert left == 50 * config.hidden_size * 4  # fc2's


def test_text_model_compiles_in_one_graph_forward_and_backward(model):
    """For lengths that change, as those of rows do."""
    text_model = model.text_model.train()
    text_model.transformer.h = text_model.transformer.h[-1:]  # a layer, to be quick
    text_model.transformer.h[0].mixer.layer = 0
    compiled = torch.compile(text_model, backend="aot_eager", fullgraph=True)
    for tokens in (20, 33):
        ids, results = torch.arange(5, 5 + 2 * tokens).view(2, tokens), []
        for each in (text_model, compiled):
            text_model.zero_grad()
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            results.append([loss, *(parameter.grad.clone() for parameter in text_model.parameters())])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_attention_does_not_keep_queries_keys_and_values_as_they_were(model):
    """They came out of one layer: a view of the values would keep all three."""
    config = model.config.text_config
    x, cos, sin = torch.randn(1, 50, config.hidden_size), *torch.rand(2, 1, 1, 50, config.rotary_dim // 2)
    _, kept = kept_for_the_backward_pass(model.text_model.transformer.h[0].mixer, x, cos, sin, None, None)
    assert max(kept) == 50 * config.hidden_size * 4


def test_only_answer_positions_leave_the_last_layers_attention(model):
    seen, last = [], model.text_model.transformer.h[-1]
    for part in (last.mixer.out_proj, last.mlp.fc1, model.text_model.lm_head.linear):
        part.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    ids, positions = torch.arange(5, 45).view(2, 20), torch.tensor([3, 4, 30])
    logits = model(input_ids=ids, answer_positions=positions).logits
    assert seen == [(3, model.config.text_config.hidden_size)] * 3
    torch.testing.assert_close(logits, model(input_ids=ids).logits.flatten(0, 1)[positions], atol=1e-5, rtol=1e-5)


def test_features_of_tiles_lie_as_the_tiles_do_in_the_picture(model):
    encoder, side = model.vision_encoder, int(model.config.image_tokens**0.5)
    for rows, columns in ((2, 2), (1, 2), (2, 1)):
        number = torch.arange(1.0, 1 + rows * columns).view(rows, columns)
        pixels = torch.kron(number, torch.ones(3, encoder.image_size, encoder.image_size))
        features = encoder._tiles(pixels).mean((1, 2, 3))[:, None, None].expand(-1, side**2, 5)
        laid = encoder._lay_side_by_side(features, pixels, None).view(side, side, 5)[..., 0]
        assert laid[0, 0] == number[0, 0] and laid[0, -1] == number[0, -1]
        assert laid[-1, 0] == number[-1, 0] and laid[-1, -1] == number[-1, -1]
