"""The model against figures of the released model's own code: shapes, pixels, embeddings, logits, losses, gradients."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moondream2.modeling_moondream2 import (
    Moondream,
    MoondreamConfig,
    TextModel,
    VisionEncoder,
    preprocess,
    preprocessed_size,
)
from tests.recipe import fill, fill_module, picture

GOLDEN = Path(__file__).parent / "golden"
STATE_DICT = json.loads((GOLDEN / "state_dict.json").read_text())
TEXT = json.loads((GOLDEN / "text_facts.json").read_text())
SIZES = json.loads((GOLDEN / "preprocess_sizes.json").read_text())["image WxH -> tensor [height, width]"]
PICTURES = [(320, 240), (500, 100), (640, 480), (1280, 720), (600, 900), (1024, 1000)]
BATCH = [(320, 240), (640, 480)]  # of them, in one call
BOS = 50256


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """For models of full size."""
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def vision_encoder():
    with torch.device("meta"):
        encoder = VisionEncoder(MoondreamConfig())
    return fill_module(encoder.to_empty(device="cpu"), "vision_encoder").eval()


@pytest.fixture(scope="session")
def text_model():
    with torch.device("meta"):
        model = TextModel(MoondreamConfig(text_config={"num_hidden_layers": 2}).text_config)
    return fill_module(model.to_empty(device="cpu"), "text_model").eval()


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
@pytest.mark.parametrize("size", [size for size in PICTURES if size not in BATCH], ids=str)
def test_image_embeddings(size, golden, vision_encoder):
    with torch.no_grad():
        embeds = vision_encoder(picture(*size))
    assert embeds.shape == (1, 729, 2048)
    expected = golden[f"vision.{size[0]}x{size[1]}.embeds"]
    torch.testing.assert_close(embeds[0, ::27, ::16], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_image_embeddings_of_a_batch_with_and_without_tiles(golden, vision_encoder):
    with torch.no_grad():
        embeds = vision_encoder([picture(*size) for size in BATCH])
    expected = golden["vision.batch_of_320x240_and_640x480.embeds"]
    torch.testing.assert_close(embeds[:, ::27, ::16], expected, atol=1e-4, rtol=0)


def sequence(model, which):
    """inputs_embeds (1, tokens, 2048) of picture, question and answer `which`, and labels on the answer alone."""
    image = fill(f"image_embeds.{which}", (1, 729, 2048), scale=0.5)
    question, answer = TEXT[f"question_{which}"], TEXT[f"answer_{which}"]
    ids = model.get_input_embeddings()(torch.tensor([[BOS, *question, *answer]]))
    embeds = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
    labels = torch.tensor([[-100] * (730 + len(question)) + answer])
    return embeds, labels


def test_logits(golden, text_model):
    with torch.no_grad():
        logits = text_model(inputs_embeds=sequence(text_model, "a")[0]).logits
    torch.testing.assert_close(logits[0, -8:, ::64], golden["text.a.last8_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("which", ["a", "b"])
def test_loss(which, text_model):
    with torch.no_grad():
        embeds, labels = sequence(text_model, which)
        loss = text_model(inputs_embeds=embeds, labels=labels).loss
    assert loss.item() == pytest.approx(TEXT[f"loss_{which}"], abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_of_a_padded_batch(side, text_model):
    (embeds_a, labels_a), (embeds_b, labels_b) = (sequence(text_model, which) for which in "ab")
    missing = embeds_b.shape[1] - embeds_a.shape[1]
    padding = (0, missing) if side == "right" else (missing, 0)
    embeds = torch.cat([torch.nn.functional.pad(embeds_a, (0, 0, *padding)), embeds_b])
    labels = torch.cat([torch.nn.functional.pad(labels_a, padding, value=-100), labels_b])
    mask = torch.ones(labels.shape, dtype=torch.long)
    mask[0] = torch.nn.functional.pad(mask[0, missing:], padding)
    with torch.no_grad():
        loss = text_model(inputs_embeds=embeds, labels=labels, attention_mask=mask).loss
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


@pytest.mark.parametrize("gradient_checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_norms(text_model, gradient_checkpointing):
    text_model.train(gradient_checkpointing)
    text_model.gradient_checkpointing = gradient_checkpointing
    text_model._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(
        f, *args, use_reentrant=False
    )
    embeds, labels = sequence(text_model, "a")
    text_model(inputs_embeds=embeds, labels=labels).loss.backward()
    norms = {name: p.grad.norm().item() for name, p in text_model.named_parameters()}
    text_model.zero_grad()
    text_model.eval()
    assert norms == pytest.approx(TEXT["gradient_norms_of_loss_a"], rel=1e-4)
