"""The model against figures of the released model's own code: shapes, pixels, embeddings, logits, losses, gradients."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moondream2.modeling_moondream2 import (
    Moondream,
    MoondreamConfig,
    preprocess,
    preprocessed_size,
)
from tests.recipe import fill, golden_encoder, golden_text_model, picture

GOLDEN = Path(__file__).parent / "golden"
STATE_DICT = json.loads((GOLDEN / "state_dict.json").read_text())
TEXT = json.loads((GOLDEN / "text_facts.json").read_text())
SIZES = json.loads((GOLDEN / "preprocess_sizes.json").read_text())["image WxH -> tensor [height, width]"]
PICTURES = [(320, 240), (500, 100), (640, 480), (1280, 720), (600, 900), (1024, 1000)]
BOS = 50256

pytestmark = pytest.mark.usefixtures("all_cores")


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def text_model():
    return golden_text_model()


def test_the_default_config_is_the_release():
    with torch.device("meta"):
        model = Moondream(MoondreamConfig())
    assert {name: list(x.shape) for name, x in model.state_dict().items()} == STATE_DICT["state_dict"]
    assert sorted(name for name, _ in model.named_buffers()) == sorted(STATE_DICT["buffers"])
    assert sum(p.numel() for p in model.parameters()) == STATE_DICT["total_parameters"]
    model.vision_encoder.requires_grad_(False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == STATE_DICT["parameters_left_after_freezing_vision_encoder"]


@pytest.mark.parametrize("size", SIZES)
def test_preprocessed_size(size):
    assert list(preprocessed_size(*map(int, size.split("x")))) == SIZES[size]
    assert preprocessed_size(*map(int, size.split("x")), tile_from=None) == (378, 378)


@pytest.mark.parametrize("size", PICTURES, ids=str)
def test_pixels(size, golden):
    pixels = preprocess(picture(*size))[:, ::27, ::27]
    torch.testing.assert_close(pixels, golden[f"vision.{size[0]}x{size[1]}.pixels"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_image_embeddings_and_a_cards_figures(golden, text_model, capsys):
    """Of a picture without tiles; how these lie, tests of the small model say, and in bfloat16 the check of a card.

    Its models are the same, and take seconds to fill.
    """
    from tests import gpu_check  # which has its figures from here

    encoder = golden_encoder()
    with torch.no_grad():
        embeds = encoder(picture(320, 240))
    assert embeds.shape == (1, 729, 2048)
    torch.testing.assert_close(embeds[0, ::27, ::16], golden["vision.320x240.embeds"], atol=1e-4, rtol=0)
    table = gpu_check.Table()
    gpu_check.golden_figures(table, torch.device("cpu"), encoder, copy.deepcopy(text_model))
    rows = capsys.readouterr().out.splitlines()[2:]
    assert table.is_good and [row.split(" | ")[0] for row in rows] == ["| golden embeddings", "| golden loss"]


def sequence(model, which):
    """inputs_embeds (1, tokens, 2048) of picture, question and answer `which`, and labels on the answer alone."""
    image = fill(f"image_embeds.{which}", (1, 729, 2048), scale=0.5)
    question, answer = TEXT[f"question_{which}"], TEXT[f"answer_{which}"]
    ids = model.get_input_embeddings()(torch.tensor([[BOS, *question, *answer]]))
    embeds = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
    labels = torch.tensor([[-100] * (730 + len(question)) + answer])
    return embeds, labels


def test_logits_loss_and_gradient_norms(golden, text_model):
    """As a run trains: logits of all positions, which take longest, are those of the loss below."""
    embeds, _ = sequence(text_model, "a")
    end, answer = embeds.shape[1], torch.tensor(TEXT["answer_a"])
    positions = torch.arange(end - max(8, len(answer) + 1), end)
    logits = text_model(inputs_embeds=embeds, answer_positions=positions).logits
    torch.testing.assert_close(logits[-8:, ::64], golden["text.a.last8_logits"], atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits[-len(answer) - 1 : -1], answer)
    assert loss.item() == pytest.approx(TEXT["loss_a"], abs=1e-5)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in text_model.named_parameters()}
    text_model.zero_grad()
    assert norms == pytest.approx(TEXT["gradient_norms_of_loss_a"], rel=1e-4)


def test_loss(text_model):
    with torch.no_grad():
        embeds, labels = sequence(text_model, "b")
        loss = text_model(inputs_embeds=embeds, labels=labels).loss
    assert loss.item() == pytest.approx(TEXT["loss_b"], abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_of_a_padded_batch(side, text_model):
    (embeds_a, labels_a), (embeds_b, labels_b) = (sequence(text_model, which) for which in "ab")
    missing = embeds_b.shape[1] - embeds_a.shape[1]
    padding = (0, missing) if side == "right" else (missing, 0)
    embeds = torch.cat([torch.nn.functional.pad(embeds_a, (0, 0, *padding)), embeds_b])
    labels = torch.cat([torch.nn.functional.pad(labels_a, padding, value=-100), labels_b])
    mask = torch.ones(labels.shape, dtype=torch.long)
    mask[0] = torch.nn.functional.pad(mask[0, missing:], padding)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    positions = (targets != -100).nonzero()[:, 0]  # the others need no logits, which take longest
    with torch.no_grad():
        logits = text_model(inputs_embeds=embeds, attention_mask=mask, answer_positions=positions).logits
    loss = torch.nn.functional.cross_entropy(logits, targets[positions])
    assert loss.item() == pytest.approx(TEXT["loss_batch_ab_mean_over_answer_tokens"], abs=1e-5)


def test_greedy_tokens(text_model):
    with torch.device("meta"):
        config = MoondreamConfig(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 0})
        model = Moondream(config)
    model.text_model = text_model
    image = fill("image_embeds.a", (1, 729, 2048), scale=0.5)
    (((ids, _),),) = model.generate_ids(image, [[TEXT["question_a"]]], bos=BOS, eos=BOS, max_new_tokens=8)
    assert ids == [token for token, _ in TEXT["greedy_after_question_a [token, margin]"]]


def test_greedy_tokens_of_transformers_own_generate(text_model):
    image = fill("image_embeds.a", (1, 729, 2048), scale=0.5)
    embeds = text_model.get_input_embeddings()(torch.tensor([[BOS, *TEXT["question_a"]]]))
    embeds = torch.cat([embeds[:, :1], image, embeds[:, 1:]], dim=1)
    ids = text_model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=BOS)
    assert ids[0].tolist() == [token for token, _ in TEXT["greedy_after_question_a [token, margin]"]]
