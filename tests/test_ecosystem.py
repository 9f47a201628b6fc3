"""The model in the hands of other libraries: quantized, offloaded, with adapters, in transformers' Trainer."""

import copy
import re
from functools import partial
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, pipeline
from transformers.trainer import default_data_collator

from tests.shared import ROOT, TINY, TINY_2025, both_releases

PICTURES = [Image.open(ROOT / "images" / f"valid_00{number}.jpg") for number in (1, 2)]
QUESTIONS = [
    ["What is it?", "Is there a crosswalk?", "Where is the car?"],
    ["Count the people who walk over the road.", "Which colour is the light for walkers?"],
]
LAYERS = {TINY: ["Wqkv", "out_proj", "fc1", "fc2"], TINY_2025: ["qkv", "proj", "fc1", "fc2"]}


@pytest.fixture
def load(small_model):
    """`load(...)` gives the small checkpoint as transformers loads it with these arguments."""
    return partial(load_from, small_model)


def load_from(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture
def ask(tokenizer):
    """What a model answers, by this project's way and by transformers'."""

    def ask(model):
        embeds = model.encode_image(PICTURES)
        answers = model.answer_questions(embeds, QUESTIONS, tokenizer, max_new_tokens=20)
        question = QUESTIONS[0][1]
        return [*answers, model.answer_question(embeds[:1], question, tokenizer, max_new_tokens=20, do_sample=False)]

    return ask


@torch.no_grad()
def logits(model):
    embeds = model.encode_image(PICTURES)
    return model(input_ids=torch.tensor([[0, 5, 6, 7, 8], [0, 9, 9, 9, 9]]), image_embeds=embeds).logits


# ---------------------------------------------------------------------------------------------------------------------
# Quantized
# ---------------------------------------------------------------------------------------------------------------------


def weight_in_4_bits(layer):
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def weight_in_8_bits(layer):
    return bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


@both_releases
@pytest.mark.parametrize(
    ("bits", "kind", "weight_of"),
    [(4, bitsandbytes.nn.Linear4bit, weight_in_4_bits), (8, bitsandbytes.nn.Linear8bitLt, weight_in_8_bits)],
)
def test_bitsandbytes(tiny, ask, load, bits, kind, weight_of):
    """In training mode it multiplies by the weights as they are; while answering, by ways of its own for a CPU."""
    quantized = load(quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, kind)}
    of_blocks = [name for name, layer in tiny.named_modules() if type(layer) is nn.Linear and "region" not in name]
    assert len(of_blocks) == 3 * 4 + 3 * 4 + 2 + 1 and layers.keys() >= {*of_blocks} - {
        "text_model.lm_head.linear",
        "model.text.lm_head",
    }
    dequantized = copy.deepcopy(tiny)
    for name, layer in layers.items():
        dequantized.get_submodule(name).weight.data = weight_of(layer).float()
    torch.testing.assert_close(logits(quantized.train()), logits(dequantized), atol=1e-3, rtol=0)
    assert (logits(dequantized) - logits(tiny)).abs().max() > 0.01
    assert ask(quantized.eval()) == ask(tiny)


@both_releases
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchs_dynamic_quantization(tiny, ask):
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(tiny), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(layer) is nn.Linear for layer in quantized.modules())
    assert ask(quantized) == ask(tiny)


@both_releases
def test_torchao(tiny, ask):
    from torchao import quantization as torchao  # it speaks while it is imported

    quantized = copy.deepcopy(tiny)
    torchao.quantize_(quantized, torchao.Int8WeightOnlyConfig())
    weights = [layer.weight for layer in quantized.modules() if isinstance(layer, nn.Linear)]
    assert weights and all(type(weight.data) is not torch.Tensor for weight in weights)
    dequantized = copy.deepcopy(tiny)
    for name, layer in quantized.named_modules():
        if isinstance(layer, nn.Linear):
            dequantized.get_submodule(name).weight.data = layer.weight.dequantize()
    torch.testing.assert_close(logits(quantized), logits(dequantized), atol=1e-3, rtol=0)
    assert ask(quantized) == ask(tiny)


# ---------------------------------------------------------------------------------------------------------------------
# Offloaded
# ---------------------------------------------------------------------------------------------------------------------

BLOCKS = {TINY: "vision_encoder.encoder.model.visual.blocks", TINY_2025: "model.vision.blocks"}
BY_LAYER = {"vision_encoder": "disk", "text_model.transformer.embd": "cpu", "text_model.transformer.h.0": "disk"}
BY_LAYER |= {"text_model.transformer.h.1": "cpu", "text_model.transformer.h.2": "disk"}
BY_LAYER |= {"text_model.lm_head": "cpu", "region_model": "disk"}
BY_LAYER_2025 = {"model.vision": "disk", "model.text.wte": "cpu", "model.text.blocks.0": "disk"}
BY_LAYER_2025 |= {"model.text.blocks.1": "cpu", "model.text.blocks.2": "disk", "model.text.post_ln": "disk"}
BY_LAYER_2025 |= {"model.text.lm_head": "cpu", "model.region": "disk"}
EVERYWHERE = ["cpu", {"": "cpu"}, {"": "disk"}, "auto"]


@pytest.mark.parametrize(
    ("small_model", "device_map"),
    [
        *((folder, device_map) for folder in (TINY, TINY_2025) for device_map in EVERYWHERE),
        (TINY, BY_LAYER),
        (TINY_2025, BY_LAYER_2025),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else str(value)[:20],
)
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_device_map(tiny, ask, load, small_model, device_map, tmp_path):
    """With "auto" and room for a part of the vision encoder, the rest is on disk."""
    most = {"max_memory": {"cpu": 4_000_000}} if device_map == "auto" else {}
    model = load(device_map=device_map, offload_folder=tmp_path, **most)
    where = getattr(model, "hf_device_map", {})
    assert any(parameter.is_meta for parameter in model.parameters()) == ("disk" in where.values())
    blocks = BLOCKS[small_model]
    assert device_map != "auto" or {where[f"{blocks}.0"], where[f"{blocks}.2"]} == {"cpu", "disk"}
    assert ask(model) == ask(tiny)


# ---------------------------------------------------------------------------------------------------------------------
# With adapters
# ---------------------------------------------------------------------------------------------------------------------


def with_adapters(folder=TINY, **options):
    torch.manual_seed(0)
    layers = LAYERS[folder]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=layers, r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(load_from(folder), config)


def loss_of(model):
    """That of some tokens behind two pictures, through the vision encoder as well."""
    ids = torch.tensor([[0, 5, 6, 7, 8], [0, 9, 9, 9, 9]])
    pixels = [model.vision_encoder.preprocess(image) for image in PICTURES]
    embeds = model.vision_encoder(pixels)
    labels = torch.cat([torch.full(embeds.shape[:2], -100), ids], dim=1)
    return model(input_ids=ids, image_embeds=embeds, labels=labels).loss


@both_releases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_adapter_trains(small_model, dropout):
    """By the gradients of a model whose GELU keeps what comes out of it. Regions, which say nothing, have none."""
    model = with_adapters(small_model, lora_dropout=dropout).train()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad and "region" not in name}
    of_vision = 3 * 2 if small_model == TINY else 3 * 4  # where its attention's layers have the text model's names
    assert len(adapters) == 2 * (3 * 4 + of_vision + 2)
    gradients = []
    for keeps in (False, True):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing") and hasattr(module, "fc2"):
                module.gradient_checkpointing = keeps
        torch.manual_seed(1)
        model.zero_grad()
        loss_of(model).backward()
        gradients.append({name: parameter.grad for name, parameter in adapters.items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_layer_that_is_computed_again_keeps_nothing_of_its_adapters():
    """What an adapter on fc2 drops out is as wide as its MLP; a hook around fc2 would hide it from the checkpoint."""
    left = []
    for dropout in (0.0, 0.3):
        model = with_adapters(lora_dropout=dropout).train()
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        embeds = torch.randn(1, 40, 192, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = model(inputs_embeds=embeds)
        left.append(sum(event.self_cpu_memory_usage for event in profile.events()))
        del out
    assert left[0] == left[1]


@both_releases
def test_an_adapter_is_saved_loaded_and_merged(tiny, ask, load, small_model, tmp_path):
    model = with_adapters(small_model).eval()
    with_it, expected = ask(model), logits(model)
    assert with_it != ask(tiny)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(loaded), expected) and ask(loaded) == with_it
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert ask(merged) == with_it


def test_an_adapter_for_the_releases_own_code_loads(load, tmp_path):
    """Its modules have the names of the release's."""
    model = with_adapters()
    model.save_pretrained(tmp_path)
    names = [f"transformer.h.{layer}.{name}" for layer in range(3) for name in ("mixer.Wqkv", "mixer.out_proj")]
    names += [f"transformer.h.{layer}.mlp.{name}" for layer in range(3) for name in ("fc1", "fc2")]
    prefix = "base_model.model.text_model."
    names = {f"{prefix}{name}.lora_{which}.weight" for name in names for which in "AB"}
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {name for name in weights if name.startswith(prefix)} == names
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path)
    state = peft.get_peft_model_state_dict(loaded)
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name] + 1) for name in state)


# ---------------------------------------------------------------------------------------------------------------------
# In transformers' own tools
# ---------------------------------------------------------------------------------------------------------------------


def test_trainer(tiny, tmp_path):
    """Its loss is that of all labels of the batch, and its predictions are logits for each position."""
    ids, embeds = torch.tensor([0, 5, 6, 7, 8]), tiny.encode_image(PICTURES)
    labels = torch.cat([torch.full((embeds.shape[1],), -100), ids])
    data = [{"input_ids": ids, "image_embeds": each, "labels": labels, "other": 0} for each in embeds]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-3
    )
    trainer = Trainer(tiny, arguments, default_data_collator, train_dataset=data, eval_dataset=data)
    assert trainer.predict(data).predictions.shape == (2, len(labels), tiny.config.text_config.vocab_size)
    expected = tiny(input_ids=ids.repeat(2, 1), image_embeds=embeds, labels=labels.repeat(2, 1)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] < expected


def test_a_pipeline_continues_a_text(tiny, tokenizer):
    (text,) = pipeline("text-generation", model=tiny, tokenizer=tokenizer)("Is there", max_new_tokens=4)
    assert text["generated_text"].startswith("Is there") and len(text["generated_text"]) > len("Is there")


def test_the_lines_of_the_page_run(tiny, tokenizer, tmp_path, monkeypatch, capsys):
    """docs/using-the-model.md, from its first block to its last, behind those of the README."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(ROOT / "images")
    tiny.save_pretrained("moondream_crosswalks_finetuned")
    tokenizer.save_pretrained("moondream_crosswalks_finetuned")
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/using-the-model.md")]
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", "\n".join(pages), re.M | re.S):
        exec(block, names)
    asked = tiny.answer_question(tiny.encode_image(PICTURES[0]), "Is there a crossing?", tokenizer)
    assert capsys.readouterr().out.splitlines()[0] == asked
    assert (tmp_path / "adapter" / "adapter_config.json").is_file() and names["model"].dtype == torch.float16
