"""The model of 2025-06-21 behind the Auto classes. Runs on every transformers release that is supported."""

import json
import shutil
from pathlib import Path
from queue import Queue

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moondream2.modeling_moondream2 import HfMoondream, HfMoondreamConfig, lay_out_rows, row_mask

TINY = Path(__file__).parent / "tiny_moondream2_2025"
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"  # its name in from_pretrained
QUESTIONS = [["Is there a crosswalk?", "Count the people who walk over the road."], ["What is the car doing?"]]


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


def prompt_of(question, tokenizer, end=(3, 3)):
    """The release's prompt, written out."""
    query, question = (tokenizer(text, split_special_tokens=True).input_ids for text in ("query", question))
    return [1, *query, 2, *question, *end]


@torch.no_grad()
def naive_ids(model, image_embeds, prompt, tokens, end=0, barred=3):
    """Greedy decoding that computes everything anew for each token, the mask written out; ids and probability."""
    answer, probability = [], 1.0
    images = 0 if image_embeds is None else image_embeds.shape[1]
    for _ in range(tokens):
        embeds = model.get_input_embeddings()(torch.tensor([[0, *prompt, *answer]]))
        if images:
            embeds = torch.cat([embeds[:, :1], image_embeds, embeds[:, 1:]], dim=1)
        mask = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()
        mask[: 1 + images, : 1 + images] = True
        logits = model.text_model(inputs_embeds=embeds, attention_mask=mask[None, None]).logits[0, -1]
        if answer and barred is not None:
            logits[barred] = float("-inf")
        token = logits.argmax().item()
        answer.append(token)
        probability *= logits.softmax(0)[token].item()
        if token == end:
            break
    return answer, probability


def naive_answer(model, tokenizer, image_embeds, question, tokens=24):
    ids, probability = naive_ids(model, image_embeds, prompt_of(question, tokenizer), tokens)
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), probability


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ---------------------------------------------------------------------------------------------------------------------


def test_the_hubs_own_config_is_the_release():
    hub = json.loads((TINY.parent / "golden" / "2025-06-21-config.json").read_text())
    with torch.device("meta"):
        model = HfMoondream(HfMoondreamConfig.from_dict(hub))
    assert sum(p.numel() for p in model.parameters()) == 1_927_237_104
    assert model.config.tokens == {
        "query": [1, 15381, 2],
        "answer": [3, 3],
        "reasoning": [3, 4],
        "short caption": [1, 32708, 2, 12492, 3],
        "normal caption": [1, 32708, 2, 6382, 3],
        "long caption": [1, 32708, 2, 4059, 3],
    }
    assert model.config.barred_token == 3
    assert model.config.release is None


def test_a_tokenizer_beside_the_hubs_weights_needs_no_hub(tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(TINY, folder)
    config = json.loads((TINY / "config.json").read_text())
    del config["release"]
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree(TINY, folder / "starmie-v1", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (folder / "tokenizer.json").write_text("{}")
    tokenizer = HfMoondreamConfig.from_pretrained(folder).load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(3) == "<|md_reserved_2|>" and tokenizer.eos_token_id == 0


def test_every_weight_is_the_files_and_is_saved_as_it_was(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY, **{DTYPE: torch.bfloat16})
    weights = load_file(TINY / "model.safetensors")
    assert model.state_dict().keys() == weights.keys() and "model.text.wte" in weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_are_encoded_in_pieces(model):
    """However many crops a picture has, no more go through the ViT at once, and they are those of each alone."""
    encoder, seen = model.vision_encoder, []
    pictures = [picture(), picture((1000, 700)), picture((3000, 200)), picture((400, 900))]
    expected = torch.cat([model.encode_image(each) for each in pictures])
    encoder.crops_at_once = 3
    hook = encoder.post_ln.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    torch.testing.assert_close(model.encode_image(pictures), expected, atol=1e-5, rtol=1e-5)
    hook.remove()
    assert max(seen) == 3 and sum(seen) == 4 + sum(
        len(encoder._tiles(encoder.preprocess(each).local)[0]) for each in pictures
    )


def test_encode_image_takes_a_picture_a_list_or_pixels(model):
    pictures = [picture(), picture((640, 480)), picture((600, 60), "brown")]
    listed = model.encode_image(pictures)
    assert listed.shape == (3, model.config.image_tokens, model.config.text_config.hidden_size)
    for each, expected in zip(pictures, listed, strict=True):
        pixels = model.vision_encoder.preprocess(each)
        for image in (each, [pixels], model.encode_image(each)):
            torch.testing.assert_close(model.encode_image(image)[0], expected, atol=1e-5, rtol=1e-5)
    assert not listed.requires_grad
    assert model.vision_encoder.preprocess(pictures[2]).local.shape == (3, 126, 126)


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_naive_decoding(model, tokenizer):
    embeds = model.encode_image([picture(), picture((640, 480), "red")])
    options = {"max_new_tokens": 24, "return_probabilities": True}
    for r, row in enumerate(model.answer_questions(embeds, QUESTIONS, tokenizer, **options)):
        for question, answer in zip(QUESTIONS[r], row, strict=True):
            text, probability = naive_answer(model, tokenizer, embeds[r : r + 1], question)
            assert answer.text == text != "" and answer.probability == pytest.approx(probability, rel=1e-4)
            asked = model.query(embeds[r : r + 1], question, tokenizer=tokenizer, max_new_tokens=24)
            assert asked == {"answer": text, "probability": pytest.approx(probability, rel=1e-4)}
            queue = Queue()
            assert model.answer_question(embeds[r : r + 1], question, tokenizer, "", queue, 24) == text == queue.get()
    asked = [questions[0] for questions in QUESTIONS]
    expected = [naive_answer(model, tokenizer, embeds[r : r + 1], question)[0] for r, question in enumerate(asked)]
    assert model.batch_answer([picture(), picture((640, 480), "red")], asked, max_new_tokens=24) == expected


def test_the_token_that_begins_an_answer_is_in_none(model, tokenizer):
    """Where it would win at every step, it comes first and never again, by this project's way and transformers'."""
    model.text_model.lm_head.bias.data[3] = 1e4
    embeds, (prompt,) = model.encode_image(picture()), [prompt_of("Why?", tokenizer)]
    (((ids, probability),),) = model.generate_ids(embeds, [[prompt]], 0, 0, max_new_tokens=6)
    expected, chance = naive_ids(model, embeds, prompt, 6)
    assert ids == expected and ids[0] == 3 and 3 not in ids[1:] and probability == pytest.approx(chance, rel=1e-4)
    seen, decode = [], tokenizer.batch_decode
    tokenizer.batch_decode = lambda ids, **options: seen.append(ids[0].tolist()) or decode(ids, **options)
    try:
        model.answer_question(embeds, "Why?", tokenizer, max_new_tokens=6, do_sample=False)
    finally:
        del tokenizer.batch_decode
    assert seen == [expected]


@pytest.mark.parametrize("arguments", [{"num_beams": 1}, {"do_sample": False}, {"no_repeat_ngram_size": 50}], ids=str)
def test_each_way_to_ask_hands_on_what_transformers_generate_takes(model, tokenizer, arguments):
    embeds, question = model.encode_image(picture((640, 480), "red")), QUESTIONS[0][1]
    expected = naive_answer(model, tokenizer, embeds, question)[0]
    options = {"max_new_tokens": 24, **arguments}
    assert model.answer_question(embeds, question, tokenizer, **options) == expected
    assert model.batch_answer([picture((640, 480), "red")], [question], tokenizer, **options) == [expected]


def test_transformers_generate_lets_bos_and_picture_see_each_other(model, tokenizer):
    """By the scores of the first token, which a processor of the caller's is given."""
    embeds, scores = model.encode_image(picture((640, 480), "red")), []
    note = [lambda ids, given: scores.append(given.clone()) or given]
    model.answer_question(embeds, "Why?", tokenizer, max_new_tokens=1, logits_processor=note)
    ids = torch.tensor([[0, *prompt_of("Why?", tokenizer)]])
    x = model.get_input_embeddings()(ids)
    x = torch.cat([x[:, :1], embeds, x[:, 1:]], dim=1)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask[: model.config.prefix_tokens, : model.config.prefix_tokens] = True
    with torch.no_grad():
        expected = model.text_model(inputs_embeds=x, attention_mask=mask[None, None]).logits[:, -1]
    torch.testing.assert_close(scores[0], expected, atol=1e-4, rtol=1e-4)


def test_beams_find_an_answer_at_least_as_likely(model, tokenizer):
    embeds, question = model.encode_image(picture((640, 480), "red")), QUESTIONS[0][1]
    found = model.answer_question(embeds, question, tokenizer, max_new_tokens=24, num_beams=4, length_penalty=0.0)

    def chance(text):
        prompt, answer = prompt_of(question, tokenizer), [*tokenizer(text).input_ids, 0]
        ids = torch.tensor([[0, *prompt, *answer]])
        with torch.no_grad():
            logits = model(input_ids=ids, image_embeds=embeds).logits[0, -1 - len(answer) : -1].log_softmax(-1)
        return logits.gather(-1, torch.tensor(answer)[:, None]).sum().item()

    assert chance(found) >= chance(naive_answer(model, tokenizer, embeds, question)[0]) - 1e-4


def test_a_question_without_a_picture(model, tokenizer):
    ids, probability = naive_ids(model, None, prompt_of("Why?", tokenizer), 12)
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    asked = model.query(None, "Why?", tokenizer=tokenizer, max_new_tokens=12)
    assert asked == {"answer": text, "probability": pytest.approx(probability, rel=1e-4)}


def test_reasoning_comes_before_the_answer(model, tokenizer):
    """The model thinks behind `3 4` up to a `3`; behind that it answers."""
    embeds = model.encode_image(picture())
    asked = model.query(embeds, "Why?", reasoning=True, tokenizer=tokenizer, max_new_tokens=12)
    prompt = prompt_of("Why?", tokenizer, end=(3, 4))
    thought, _ = naive_ids(model, embeds, prompt, 12, end=3, barred=None)
    thought = [token for token in thought if token != 3]
    answer, probability = naive_ids(model, embeds, [*prompt, *thought, 3], 12)
    assert asked["reasoning"] == {"text": tokenizer.decode(thought, skip_special_tokens=True).strip()}
    assert asked["answer"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert asked["probability"] == pytest.approx(probability, rel=1e-4)
    model.text_model.lm_head.bias.data[3] = 1e4  # then it has thought at once
    assert model.query(embeds, "Why?", reasoning=True, tokenizer=tokenizer)["reasoning"] == {"text": ""}


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_captions(model, tokenizer, length):
    describe, how = (tokenizer(text).input_ids for text in ("describe", length))
    embeds = model.encode_image(picture())
    ids, _ = naive_ids(model, embeds, [1, *describe, 2, *how, 3], 16)
    expected = {"caption": tokenizer.decode(ids, skip_special_tokens=True).strip()}
    assert model.caption(picture(), length, max_new_tokens=16) == expected


def test_what_needs_the_releases_own_code_says_so(model):
    for method in (model.detect, model.point):
        with pytest.raises(NotImplementedError, match="answers questions: (detect|point) needs the code"):
            method(picture(), "car")
    with pytest.raises(ValueError, match="takes no chat_history"):
        model.answer_question(model.encode_image(picture()), "Why?", chat_history="Question: a\n\nAnswer: b\n\n")


def test_a_users_words_are_text(model, tokenizer):
    (prompt,) = model.config.prompt_ids(["a<|md_reserved_2|>b<|endoftext|>"], tokenizer)
    query = tokenizer("query").input_ids
    assert prompt[: 2 + len(query)] == [1, *query, 2] and prompt[-2:] == [3, 3]
    assert all(token > 20 for token in prompt[2 + len(query) : -2])
    assert tokenizer.decode(prompt[2 + len(query) : -2]) == "a<|md_reserved_2|>b<|endoftext|>"
    (answer,) = model.config.answer_ids(["no<|endoftext|>"], tokenizer)
    assert answer[-1] == 0 and all(token > 20 for token in answer[:-1])
    assert model.config.answer_ids([""], tokenizer) == [[0]]
    assert answer[:-1] == tokenizer("no<|endoftext|>", split_special_tokens=True).input_ids, "no space before it"


# ---------------------------------------------------------------------------------------------------------------------
# The mask
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(model, tokenizer, questions=QUESTIONS):
    prompts = [[prompt_of(question, tokenizer) for question in row] for row in questions]
    rows = [[(prompt, [5, 6, 0]) for prompt in row] for row in prompts]
    return lay_out_rows(rows, 0, model.config.image_tokens)


def test_questions_of_a_row_say_what_they_say_alone(model, tokenizer):
    embeds = model.encode_image([picture(), picture((640, 480), "red")])
    rows = rows_of(model, tokenizer)
    mask = row_mask(rows["document_ids"], model.config.prefix_tokens)
    assert mask.shape[2] == rows["input_ids"].shape[1] - 1, "a picture's part needs no mask"
    inputs = {"input_ids": rows["input_ids"], "image_embeds": embeds, "position_ids": rows["position_ids"]}
    with torch.no_grad():
        logits = model(**inputs, attention_mask=mask).logits
        for r, row in enumerate(QUESTIONS):
            for k, question in enumerate(row, start=1):
                ids = torch.tensor([[0, *prompt_of(question, tokenizer), 5, 6, 0]])
                alone = model(input_ids=ids, image_embeds=embeds[r : r + 1]).logits[0, model.config.prefix_tokens :]
                here = logits[r, rows["document_ids"][r] == k]
                torch.testing.assert_close(here, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bos_and_picture_see_each_other_and_no_more(implementation, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(
        TINY, attn_implementation=implementation, **{DTYPE: torch.float32}
    ).eval()
    embeds, prefix = model.encode_image(picture()), model.config.prefix_tokens
    ids = torch.tensor([[0, *prompt_of("Why?", tokenizer)]])
    x = model.get_input_embeddings()(ids)
    x = torch.cat([x[:, :1], embeds, x[:, 1:]], dim=1).detach().requires_grad_()
    for position, expected in (
        (0, prefix),
        (5, prefix),
        (prefix - 1, prefix),
        (prefix, prefix + 1),
        (prefix + 2, prefix + 3),
    ):
        logits = model.text_model(inputs_embeds=x, prefix_tokens=prefix).logits
        (gradient,) = torch.autograd.grad(logits[0, position].sum(), x)
        assert gradient[0].abs().sum(-1).gt(0).tolist() == [i < expected for i in range(x.shape[1])], position
    causal = model.text_model(inputs_embeds=x).logits
    (gradient,) = torch.autograd.grad(causal[0, 5].sum(), x)
    assert gradient[0].abs().sum(-1).gt(0).sum() == 6, "who says nothing of a prefix gets a text model as any other"


def training_inputs(model, tokenizer, questions=QUESTIONS):
    """What the text model gets in training of rows of questions."""
    rows = rows_of(model, tokenizer, questions)
    inputs = {name: rows[name] for name in ("input_ids", "position_ids", "answer_positions")}
    embeds = model.encode_image([picture(), picture((640, 480), "red")])
    return inputs | {
        "image_embeds": embeds,
        "attention_mask": row_mask(rows["document_ids"], model.config.prefix_tokens),
    }


def test_text_model_compiles_in_one_graph_forward_and_backward(model, tokenizer):
    """For lengths that change, as those of rows do."""
    del model.text_model.layers[:-1]  # to be quick
    compiled = torch.compile(model.text_model, fullgraph=True, backend="aot_eager")
    for questions in (QUESTIONS, [["Why?", "Where?"], ["Who is it?"]]):
        results, inputs = [], training_inputs(model, tokenizer, questions)
        for text_model in (model.text_model, compiled):
            model.zero_grad()
            total = text_model(**inputs).logits.sum()
            total.backward()
            results.append([total, *(parameter.grad.clone() for parameter in model.text_model.parameters())])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(model, tokenizer):
    inputs, gradients = training_inputs(model, tokenizer), []
    for is_on in (False, True):
        if is_on:
            model.gradient_checkpointing_enable()
        model.train()
        model.text_model(**inputs).logits.float().pow(2).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.text_model.named_parameters()})
        model.zero_grad()
    assert all(torch.equal(tensor, gradients[1][name]) for name, tensor in gradients[0].items())
