"""The model behind the Auto classes: loading, saving, asking. Runs on every transformers release that is supported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from moondream2 import modeling_moondream2
from moondream2.modeling_moondream2 import lay_out_rows, preprocess, prompt_text, row_mask, upright_rgb

TINY = Path(__file__).parent / "tiny_moondream2"
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"  # its name in from_pretrained
REVISION = "92d3d73b6fd61ab84d9fe093a9c7fd8c04bf2c0d"


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


def python(code, cwd, *options, **environment):
    """What a process prints that runs `code`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_loads_from_the_hub_without_running_its_code(tmp_path):
    snapshot = tmp_path / "hub" / "models--vikhyatk--moondream2" / "snapshots" / REVISION
    shutil.copytree(TINY, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "2024-08-26").write_text(REVISION)
    config = json.loads((TINY / "config.json").read_text())
    hub = {
        "architectures": ["Moondream"],
        "auto_map": {
            "AutoConfig": "configuration_moondream.MoondreamConfig",
            "AutoModelForCausalLM": "moondream.Moondream",
        },
        "model_type": "moondream1",
        "text_config": {**config["text_config"], "model_type": "phi"},
        "vision_config": config["vision_config"],
        "region_features": config["region_features"],
        "torch_dtype": "float16",
        "transformers_version": "4.44.0",
    }
    (snapshot / "config.json").write_text(json.dumps(hub))
    for name in ("moondream.py", "configuration_moondream.py"):
        (snapshot / name).write_text("raise SystemExit('code of the hub was run')")
    code = f"""
import torch
from moondream2 import modeling_moondream2
from transformers import AutoModelForCausalLM, AutoTokenizer
for revision in ("{REVISION}", "2024-08-26"):
    model = AutoModelForCausalLM.from_pretrained("vikhyatk/moondream2", revision=revision, {DTYPE}=torch.bfloat16)
    AutoTokenizer.from_pretrained("vikhyatk/moondream2", revision=revision)
    assert type(model) is modeling_moondream2.Moondream
    assert {{p.dtype for p in model.parameters()}} == {{torch.bfloat16}}
model.save_pretrained("saved")
print("loaded")
"""
    out = python(code, tmp_path, HF_HOME=str(tmp_path), PYTHONPATH=str(TINY.parent.parent))
    assert "loaded" in out
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"] == {
        "AutoConfig": "modeling_moondream2.MoondreamConfig",
        "AutoModelForCausalLM": "modeling_moondream2.Moondream",
    }


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


def test_a_saved_model_loads_without_this_project(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    picture().save(tmp_path / "picture.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = f"""
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = "../saved"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, {DTYPE}="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
print(model.answer_question(model.encode_image(Image.open("../picture.png")), "What is it?", tokenizer))
print(type(model).__module__)
"""
    answer, module = python(code, elsewhere, "-P", HF_HOME=str(tmp_path / "home")).strip().rsplit("\n", 1)
    assert module.startswith("transformers_modules")
    assert answer == model.answer_question(model.encode_image(picture()), "What is it?", tokenizer)


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
    assert most == [1, 2, 3, 4]


@pytest.mark.parametrize(("stored", "tokens"), [(3, 3), (None, 256)])
def test_an_answers_length_is_stored_with_the_model(model, tmp_path, stored, tokens):
    model.generation_config.max_new_tokens = stored
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ((answer, _),) = again.generate_ids(again.encode_image(picture()), [[[5, 6, 7]]], bos=0, eos=-2)[0]
    assert len(answer) == tokens


def test_a_new_token_costs_one_tokens_work(model, tokenizer):
    seen = []
    model.text_model.transformer.h[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
    ids = model.generate_ids(model.encode_image(picture()), [[[5, 6, 7], [8, 9]]], bos=0, eos=-1, max_new_tokens=4)
    assert [len(answer) for answer, _ in ids[0]] == [4, 4]
    assert [tuple(each) for each in seen] == [(1, 1 + model.config.image_tokens + 5), (1, 2), (1, 2), (1, 2)]


def test_gradient_checkpointing_changes_no_gradient(model):
    rows = lay_out_rows([[([5, 6], [7]), ([8], [9])]], bos=0, image_tokens=model.config.image_tokens)
    labels = torch.where(rows["document_ids"] > 0, 7, -100)
    inputs = {
        "input_ids": rows["input_ids"],
        "image_embeds": model.encode_image(picture()),
        "position_ids": rows["position_ids"],
        "attention_mask": row_mask(rows["document_ids"]),
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
    for got, expected in zip(given[0], (angles.cos(), angles.sin()), strict=True):
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
    text_model, ids = model.text_model.train(), torch.arange(5, 45).view(2, 20)
    text_model.transformer.h = text_model.transformer.h[-1:]  # a layer, to be quick
    text_model.transformer.h[0].mixer.layer = 0
    compiled = torch.compile(text_model, backend="aot_eager", fullgraph=True)
    results = []
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
