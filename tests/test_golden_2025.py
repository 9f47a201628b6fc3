"""The model of 2025-06-21 against figures of that release's own code: shapes, tiles, embeddings, logits, gradients."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moondream2.modeling_moondream2 import HfMoondream, HfMoondreamConfig, HfTextModel, HfVisionEncoder, tiling
from tests.recipe import fill, fill_module, picture

GOLDEN = Path(__file__).parent / "golden"
FACTS = json.loads((GOLDEN / "2025-06-21.json").read_text())
TEXT, SMALL, CROPS = FACTS["text"], FACTS["small"], FACTS["crops"]
# One picture of each way in which tiles lie.
EMBEDDED = ["320x240", "640x480", "500x1950", "379x379", "600x900", "1500x500", "3000x400"]
SMALL_TEXT = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
SMALL_TEXT |= {"vocab_size": 16384}
SMALL_VISION = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "projection_size": 192}
SMALL_REGION = {"hidden_size": 160, "coord_features": 32, "size_features": 64, "coord_bins": 64, "size_bins": 128}

pytestmark = pytest.mark.usefixtures("all_cores")


@pytest.fixture(scope="session")
def golden_2025():
    return load_file(GOLDEN / "2025-06-21.safetensors")


@pytest.fixture(scope="session")
def text_model():
    with torch.device("meta"):
        model = HfTextModel(HfMoondreamConfig(text_config={"num_hidden_layers": 2}).text_config)
    return fill_module(model.to_empty(device="cpu"), "model.text").eval()


@pytest.fixture(scope="session")
def small():
    """Picture to tokens in a small model."""
    model = HfMoondream(HfMoondreamConfig(text_config=SMALL_TEXT, vision_config=SMALL_VISION, region=SMALL_REGION))
    return fill_module(model, "", scale=SMALL["scale"]).eval()


def pixels_of(size):
    return picture(*map(int, size.split("x")))


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_default_config_is_the_release():
    with torch.device("meta"):
        model = HfMoondream(HfMoondreamConfig())
    assert shapes(model) == FACTS["state_dict"] and not list(model.buffers())
    assert sum(p.numel() for p in model.parameters()) == FACTS["parameters"]["all"]
    for part in ("vision", "text", "region"):
        assert sum(p.numel() for p in model.model[part].parameters()) == FACTS["parameters"][part]


@pytest.mark.parametrize("size", FACTS["tilings (image WxH)"])
def test_tilings(size):
    rows, columns = tiling(*map(int, size.split("x")))
    facts = FACTS["tilings (image WxH)"][size]
    assert [rows, columns] == facts["tiling"]
    assert [rows * 266 + 112, columns * 266 + 112] == facts["resized"] and rows * columns + 1 == facts["crops"]


@pytest.mark.parametrize("size", CROPS)
def test_crops(size, golden_2025, small):
    encoder = small.vision_encoder
    pixels = encoder.preprocess(pixels_of(size))
    tiles, laid = encoder._tiles(pixels.local)
    crops = torch.cat([pixels.whole[None], tiles if len(tiles) else pixels.whole[None]])
    levels = ((crops + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert list(laid) == CROPS[size]["tiling"] and len(crops) == CROPS[size]["crops"]
    assert torch.equal(levels[:, ::27, ::27], golden_2025[f"crops.{size}"])
    assert [crop.long().sum().item() for crop in levels] == CROPS[size]["sum of each crop"]


@pytest.mark.slow
def test_image_embeddings_of_full_size(golden_2025):
    """Of a picture without tiles: how these lie, the small model below says against the same code's figures."""
    with torch.device("meta"):
        encoder = HfVisionEncoder(HfMoondreamConfig())
    encoder = fill_module(encoder.to_empty(device="cpu"), "model.vision").eval()
    with torch.no_grad():
        embeds = encoder(pixels_of("320x240"))
    assert embeds.shape == (1, 729, 2048)
    torch.testing.assert_close(embeds[0, ::27, ::16], golden_2025["vision.320x240.embeds"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [EMBEDDED[:3], pytest.param(EMBEDDED[3:], marks=pytest.mark.slow)], ids=len)
def test_image_embeddings(sizes, golden_2025, small):
    embeds = small.encode_image([pixels_of(size) for size in sizes])
    for size, each in zip(sizes, embeds, strict=True):
        torch.testing.assert_close(each[::27, ::4], golden_2025[f"small.{size}.embeds"], atol=2e-4, rtol=0)


def sequence(which):
    """The row of image, question and answer `which`: token ids but for the image, the image, labels on the answer."""
    image = fill(f"image_embeds.{which}", (1, 729, 2048), scale=0.5)
    prompt, answer = prompt_of(TEXT[f"question_{which}"]), TEXT[f"answer_{which}"]
    return torch.tensor([[0, *prompt, *answer]]), image, torch.tensor([[-100] * (730 + len(prompt)) + answer])


def prompt_of(question):
    return [1, 15381, 2, *question, 3, 3]


def hidden_and_output(model, **inputs):
    """What goes into the last norm, and what comes out at the end."""
    hidden = []
    hook = model.post_ln.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    out = model(**inputs)
    hook.remove()
    return hidden[0], out


@pytest.mark.slow
def test_logits_loss_and_gradients(golden_2025, text_model):
    """At those positions whose figures are known, as a run asks for some alone; of all, the small model's below are."""
    ids, image, labels = sequence("a")
    end, answer = TEXT["row_length_a"], labels[labels != -100]
    last = max(8, len(answer) + 1)
    positions = torch.tensor([*range(0, end, 64), 0, 365, 729, *range(end - last, end)])
    hidden, out = hidden_and_output(text_model, input_ids=ids, image_embeds=image, answer_positions=positions)
    known, of_three = hidden[: -last - 3, ::16], out.logits[-last - 3 : -last, ::64]
    for got, name in (
        (out.logits[-8:, ::64], "last8_logits"),
        (of_three, "logits_at_positions_0_365_729"),
        (known, "hidden_before_lm_head"),
    ):
        torch.testing.assert_close(got, golden_2025[f"text.a.{name}"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(out.logits[-len(answer) - 1 : -1], answer)
    assert loss.item() == pytest.approx(TEXT["loss_a"], abs=1e-5)
    loss.backward()
    norms = {f"model.text.{name}": p.grad.norm().item() for name, p in text_model.named_parameters()}
    text_model.zero_grad()
    assert norms == pytest.approx(TEXT["gradient_norms_of_loss_a"], rel=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_padded_batch(golden_2025, text_model):
    (ids_a, image_a, labels_a), (ids_b, image_b, labels_b) = map(sequence, "ab")
    missing = ids_b.shape[1] - ids_a.shape[1]
    ids = torch.cat([F.pad(ids_a, (0, missing)), ids_b])
    labels = torch.cat([F.pad(labels_a, (0, missing), value=-100), labels_b])
    mask = torch.ones(labels.shape, dtype=torch.long)
    mask[0, -missing:] = 0
    end, whole = TEXT["row_length_a"], labels.shape[1]
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    learned = (targets != -100).nonzero()[:, 0]  # the others need no logits, which take longest
    positions = torch.cat([learned, torch.arange(end - 8, end), torch.arange(2 * whole - 8, 2 * whole)])
    inputs = {"input_ids": ids, "image_embeds": torch.cat([image_a, image_b]), "attention_mask": mask}
    logits = text_model(**inputs, answer_positions=positions).logits
    of_answers, last_of_a, last_of_b = logits.split([len(learned), 8, 8])
    torch.testing.assert_close(last_of_a[:, ::64], golden_2025["text.a.last8_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(last_of_b[:, ::64], golden_2025["text.b.last8_logits"], atol=1e-4, rtol=0)
    losses, is_b = F.cross_entropy(of_answers, targets[learned], reduction="none"), learned >= whole
    assert losses.mean().item() == pytest.approx(TEXT["loss_batch_ab_mean_over_answer_tokens"], abs=1e-5)
    assert losses[is_b].mean().item() == pytest.approx(TEXT["loss_b"], abs=1e-5)


@pytest.mark.slow
def test_greedy_tokens(text_model):
    with torch.device("meta"):
        config = HfMoondreamConfig(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 0})
        model = HfMoondream(config)
    model.model["text"] = text_model
    image = fill("image_embeds.a", (1, 729, 2048), scale=0.5)
    (((ids, _),),) = model.generate_ids(image, [[prompt_of(TEXT["question_a"])]], bos=0, eos=0, max_new_tokens=8)
    assert ids == [token for token, _ in TEXT["greedy_after_question_a [token, margin]"]]


@pytest.mark.slow
def test_greedy_tokens_of_transformers_own_generate(text_model):
    """Given embeddings, and told how many of them are the prefix; token 3 would come first nowhere in these."""
    ids, image, _ = sequence("a")
    embeds = text_model.get_input_embeddings()(ids[:, : -TEXT["answer_tokens_a"]])
    embeds = torch.cat([embeds[:, :1], image, embeds[:, 1:]], dim=1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 0, "prefix_tokens": 730}
    ids = text_model.generate(inputs_embeds=embeds, attention_mask=torch.ones(1, embeds.shape[1]), **options)
    assert ids[0].tolist() == [token for token, _ in TEXT["greedy_after_question_a [token, margin]"]]


def test_a_small_model_from_picture_to_tokens_and_gradients(golden_2025, small):
    assert shapes(small) == SMALL["state_dict"]
    image, prompt = small.encode_image(pixels_of("640x480")), prompt_of(SMALL["question"])
    greedy = [token for token, _ in SMALL["greedy [token, margin]"]]
    (((ids, _),),) = small.generate_ids(image, [[prompt]], bos=0, eos=0, max_new_tokens=len(greedy))
    assert ids == greedy
    ids = torch.tensor([[0, *prompt, *SMALL["answer"]]])
    labels = torch.tensor([[-100] * (730 + len(prompt)) + SMALL["answer"]])
    out = small(input_ids=ids, image_embeds=image, labels=labels)
    assert out.loss.item() == pytest.approx(SMALL["loss"], abs=5e-5)
    first = out.logits[0, 730 + len(prompt) - 1, ::64]
    torch.testing.assert_close(first, golden_2025["small.logits_after_question"], atol=3e-4, rtol=0)
    torch.testing.assert_close(out.logits[0, -8:, ::64], golden_2025["small.last8_logits"], atol=3e-4, rtol=0)
    out.loss.backward()
    norms = {name: p.grad.norm().item() for name, p in small.named_parameters() if p.grad is not None}
    small.zero_grad()
    assert norms == pytest.approx(SMALL["gradient_norms"], rel=1e-4)
