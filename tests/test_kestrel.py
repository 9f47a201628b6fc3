"""Moondream's own engine, without a card: what a run of 2025-06-21 saves is the same there as here, part by part.

Its package, kestrel, asks for eight packages of GPU kernels. None runs here: plain torch stands in for them.
Each part is asked for by the name that it has in the version that tests/requirements-kestrel.txt pins.
"""

import asyncio
import dataclasses
import importlib
import inspect
import json
import os
import random
import re
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moondream2.modeling_moondream2 import HfMoondreamConfig, token_ids
from tests.child import Child
from tests.shared import ROOT, TINY_2025

pytestmark = pytest.mark.slow  # `python -m pytest` does without the engine

INSTALL = "pip install --no-deps -r tests/requirements-kestrel.txt"
PARTS = {
    "config": ("kestrel.models.moondream.config", ["MoondreamConfig"]),
    "crops": ("kestrel.models.moondream.image_crops", ["kestrel_native", "overlap_crop_image", "select_tiling"]),
    "engine": ("kestrel.engine", ["InferenceEngine"]),
    "layers": ("kestrel.models.moondream.layers", ["get_runtime"]),
    "model": ("kestrel.models.moondream.model", ["MoondreamModel"]),
    "region": ("kestrel.models.moondream.region", ["build_region_module"]),
    "registry": ("kestrel.models.registry", ["get_spec"]),
    "runtime": ("kestrel.models.moondream.runtime", ["MoondreamRuntime"]),
    "settings": ("kestrel.config", ["RuntimeConfig"]),
    "text": ("kestrel.models.moondream.text", ["get_runtime", "lm_head", "text_decoder", "text_encoder"]),
    "tokenizer": ("kestrel.runtime.tokenizer", ["load_tokenizer"]),
    "vision": ("kestrel.models.moondream.vision", ["encode_image", "get_runtime"]),
    "weights": ("kestrel.models.moondream.weights", ["load_moondream_weights"]),
}
QUESTIONS = [
    "Is there a crossing?",
    "Does the sign say \"Stop\" or 'Go'? It's I'LL",
    "Что показывает сигнал? 信号は何色ですか 🚦",
    "a\tb\t\tc   d     e",
    "first line\r\nsecond\n\n\nfourth",
    "{{ 1 }} {% if %} <b>&amp;</b> \\n \\u0041",
    "<|md_reserved|> <|endoftext| > <image>",
    "  What stands at its ends, it takes away. \n",
]
SIZES = {(1, 1): (100, 60), (2, 2): (300, 300), (1, 4): (700, 150)}  # {(rows, columns) of tiles: width, height}


def lines_of(file):
    return [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The engine, its parts, and what stands in for its kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kestrel():
    """The engine's modules by the names in PARTS, and its Moondream2, `spec`."""
    modules = {}
    for key, (name, parts) in PARTS.items():
        try:
            modules[key] = importlib.import_module(name)
        except ImportError as error:
            pytest.fail(f"the engine is not there, or has another form ({error}): {INSTALL}")
        gone = [part for part in parts if not hasattr(modules[key], part)]
        if gone:
            pytest.fail(f"{name} of kestrel {version('kestrel')} has no {', '.join(gone)}, on which this test rests")
    return SimpleNamespace(**modules, spec=modules["registry"].get_spec("moondream2"))


def layer_norm(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def turn(positions, q, k, dim, cos_sin):
    """Rotary positions, in place: `cos_sin` (positions, dim / 2) of what turns, q and k (1, tokens, heads, dim)."""
    cos, sin = cos_sin[positions][:, :, None].chunk(2, dim=-1)
    half = cos.shape[-1]
    for x in (q, k):
        a, b = x[..., :half].float(), x[..., half : 2 * half].float()
        x[..., : 2 * half] = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q, k, v, causal, mask_mod=None, aux_tensors=None, **paging):
    """Attention of (1, tokens, heads, dim). With `mask_mod`, who is of one block, told by number, sees all of it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal or mask_mod:
        mask = mask.tril()
    if mask_mod:
        (blocks,) = aux_tensors
        mask = mask | ((blocks[:, :, None] == blocks[:, None]) & (blocks >= 0)[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous(), None


KERNELS = SimpleNamespace(
    attention=SimpleNamespace(flash_attn_fwd=attend, block_bidirectional_mask=True),
    dense=SimpleNamespace(
        layernorm_bias=layer_norm,
        layernorm_bias_into=lambda out, *arguments: out.copy_(layer_norm(*arguments)),
    ),
    linear=SimpleNamespace(linear=F.linear),
    rotary=SimpleNamespace(rotary_embedding=turn),
    vision=SimpleNamespace(
        fused_linear_bias_residual_into=lambda x, w, b, residual, out: out.copy_(residual + F.linear(x, w, b))
    ),
)


def resize(pixels, height, width):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


PILLOW = SimpleNamespace(
    resize_lanczos3=resize,
    resize_lanczos3_into=lambda pixels, height, width, out: np.copyto(out, resize(pixels, height, width)),
)


class Cache:
    """Keys and values of a layer, in a page as long as they are."""

    def update(self, position_ids, k, v, slot_mapping):
        self.cache = SimpleNamespace(k_cache=k.permute(0, 2, 1, 3), v_cache=v.permute(0, 2, 1, 3))


def config_of(kestrel, ours):
    """The engine's configuration, in which all is replaced that ours says as well."""
    text, vision, region, tokens = ours.text_config, ours.vision_config, ours.region, ours.tokens
    config = deepcopy(kestrel.spec.default_config)
    config["text"] |= {
        "dim": text.hidden_size,
        "ff_dim": text.intermediate_size,
        "n_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "max_context": text.max_position_embeddings,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_attention_heads,
        "prefix_attn": ours.prefix_tokens,
        "rope_theta": text.rotary_theta,
    }
    config["vision"] |= {
        "enc_dim": vision.hidden_size,
        "enc_patch_size": vision.patch_size,
        "enc_n_layers": vision.num_hidden_layers,
        "enc_ff_dim": vision.intermediate_size,
        "enc_n_heads": vision.num_attention_heads,
        "proj_out_dim": text.hidden_size,
        "crop_size": vision.image_size,
        "max_crops": vision.max_tiles,
        "overlap_margin": vision.overlap_margin,
        "proj_inner_dim": vision.projection_size,
    }
    config["region"] |= {
        "dim": text.hidden_size,
        "coord_feat_dim": region["coord_features"],
        "coord_out_dim": region["coord_bins"],
        "size_feat_dim": region["size_features"],
        "size_out_dim": region["size_bins"],
    }
    config["tokenizer"]["templates"] |= {
        "caption": {name: tokens[f"{name} caption"] for name in ("short", "normal", "long")},
        "query": config["tokenizer"]["templates"]["query"]
        | {
            "prefix": tokens["query"],
            "answer_prefix": tokens["answer"],
            "reasoning_prefix": tokens["reasoning"],
            "answer_suppressed_token_ids": [ours.barred_token],
        },
    }
    return kestrel.config.MoondreamConfig.from_dict(config)


def load(kestrel, folder, ours, dtype):
    """(model, region) as the engine reads them; what it leaves unread is NaN."""
    config = config_of(kestrel, ours)
    model = kestrel.model.MoondreamModel(config, dtype=dtype)
    region = kestrel.region.build_region_module(config.region, dtype)
    width, inner = config.region.dim, ours.region["hidden_size"]
    for decoder in (region["coord_decoder"], region["size_decoder"]):  # of an inner width that its code fixes
        decoder["fc1"] = nn.Linear(width, inner, dtype=dtype)
        decoder["fc2"] = nn.Linear(inner, decoder["fc2"].out_features, dtype=dtype)
    for parameter in [*model.parameters(), *region.parameters()]:
        parameter.data.fill_(float("nan"))
    kestrel.weights.load_moondream_weights(
        str(folder / kestrel.spec.filename), model, region=region, checkpoint_format=kestrel.spec.checkpoint_format
    )
    return model.eval(), region


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    flags = {"model_id": TINY_2025, "train_file": ROOT / "tests" / "test.jsonl", "valid_file": "none", "epochs": 1}
    flags |= {"valid_answers": 0}
    run = Child(flags | {"output_dir": folder / "saved", "features_dir": folder / "features"}, folder / "out.txt")
    assert run.wait() == 0, run.text()
    return folder / "saved"


@pytest.fixture(scope="module")
def tokenizer(saved):
    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def own(saved):
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def asked(kestrel, saved, own):
    """What the engine's skills ask of its runtime."""
    tokenizer = kestrel.tokenizer.load_tokenizer(kestrel.spec.tokenizer_id, saved / "tokenizer.json")
    template = config_of(kestrel, own.config).tokenizer
    return SimpleNamespace(tokenizer=tokenizer, prompt_template=template, model_name=kestrel.spec.name)


def ask(kestrel, asked, skill, **words):
    """(token ids of the prompt, the state that follows its answer)."""
    skill = kestrel.spec.skills().resolve(skill)
    built = skill.build_request(b"picture", words, {"temperature": 0})
    assert built.temperature == 0
    tokens = skill.build_prompt_tokens(asked, built.request_context)
    return tokens, skill.create_state(asked, None, built.request_context)


# ---------------------------------------------------------------------------------------------------------------------
# The same, part by part
# ---------------------------------------------------------------------------------------------------------------------


def test_the_engines_moondream2_is_the_release(kestrel):
    """Sizes, prompts and what is barred: put into its configuration, ours change nothing."""
    ours = HfMoondreamConfig()
    assert config_of(kestrel, ours) == kestrel.config.MoondreamConfig.from_dict(deepcopy(kestrel.spec.default_config))
    assert kestrel.spec.tokenizer_id == ours.TOKENIZER[0] and kestrel.spec.filename == "model.safetensors"
    assert ours.text_config.rotary_dim == ours.text_config.hidden_size // ours.text_config.num_attention_heads // 2
    tokens = kestrel.spec.default_config["tokenizer"]
    assert (tokens["bos_id"], tokens["eos_id"], tokens["answer_id"]) == (0, 0, 3)


def test_the_engine_reads_what_a_run_saves(kestrel, saved):
    ours = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    model, region = load(kestrel, saved, ours.config, torch.bfloat16)
    read = model.state_dict() | {f"region.{name}": tensor for name, tensor in region.state_dict().items()}
    expected = {name.removeprefix("model."): tensor for name, tensor in ours.state_dict().items()}
    assert read.keys() == expected.keys()
    # Its patches have zeros at the end, for the sake of tensor cores.
    padded, width = read["vision.patch_emb.weight"], expected["vision.patch_emb.weight"].shape[1]
    assert not padded[:, width:].any()
    read["vision.patch_emb.weight"] = padded[:, :width]
    assert [name for name in expected if not torch.equal(read[name], expected[name])] == []


def test_weights_are_one_file(saved):
    """It reads no shards, and a model of full size is none either."""
    assert [file.name for file in saved.glob("*.safetensors*")] == ["model.safetensors"]
    most = inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
    assert int(re.fullmatch(r"(\d+)GB", most)[1]) * 10**9 > 3_854_538_968


def test_the_engines_tokens_are_ours(kestrel, saved, tokenizer, asked):
    questions = {line["question"] for file in ("train.jsonl", "valid.jsonl") for line in lines_of(file)}
    draw = random.Random(0)
    alphabets = [" \t\n\r\u00a0\u3000ab.'\"", "abc dEF 0123.,?!'", "äßи語한🚦e\u0301\u200d\ufeff <|>"]
    questions |= {"".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 40))) for _ in range(500)}
    questions = [*QUESTIONS, *sorted(questions)]
    by_folder = kestrel.tokenizer.load_tokenizer(None, saved)
    for question, ours in zip(questions, token_ids(questions, tokenizer), strict=True):
        assert asked.tokenizer.encode(question).ids == by_folder.encode(question).ids == ours, repr(question)
    for text in (token.content for token in tokenizer.added_tokens_decoder.values()):
        assert len(asked.tokenizer.encode(text).ids) == 1, "docs/serving.md: there these are no text"


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_engines_prompt_is_ours(kestrel, asked, own, tokenizer, question):
    tokens, state = ask(kestrel, asked, "query", question=question, reasoning=False)
    ours = own.config.prompt_ids([question.strip()], tokenizer)[0]
    assert [token.token_id for token in tokens] == [tokenizer.bos_token_id, *ours]
    assert state.suppressed_token_ids(asked) == [own.config.barred_token]


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_the_engines_prompt_for_a_caption_is_ours(kestrel, asked, own, length):
    tokens, state = ask(kestrel, asked, "caption", length=length)
    assert [token.token_id for token in tokens] == [0, *own.config.tokens[f"{length} caption"]]
    assert state.suppressed_token_ids(asked) == [own.config.barred_token]


# ---------------------------------------------------------------------------------------------------------------------
# From a picture to an answer
# ---------------------------------------------------------------------------------------------------------------------


class Engine:
    """The engine's own code from pixels to logits, with KERNELS and PILLOW."""

    def __init__(self, kestrel, folder, ours, dtype):
        self.kestrel, self.dtype = kestrel, dtype
        self.model, _ = load(kestrel, folder, ours, dtype)
        self.config = self.model.config
        # Its code takes the number of layers for the patches of a side: 27 both, in the release.
        side = ours.vision_config.image_size // ours.vision_config.patch_size
        self.vision_config = dataclasses.replace(self.config.vision, enc_n_layers=side)

    def encode(self, pixels, overlap=None):
        options = {"device": torch.device("cpu"), "dtype": self.dtype}
        return self.kestrel.vision.encode_image(pixels, self.model.vision, self.vision_config, **options)

    def embed(self, tokens, staging, row):
        return self.kestrel.text.text_encoder(torch.tensor([[token.token_id for token in tokens]]), self.model.text)

    def row(self, tokens, pixels):
        """A picture and a prompt as its runtime lays them out: embeddings, and the block that each position is in."""
        runtime = SimpleNamespace(device="cpu", _embed_tokens=self.embed, encode_image=self.encode)
        lay_out = self.kestrel.runtime.MoondreamRuntime._prepare_full_prefill_inputs
        embeds, _, blocks = lay_out(runtime, tokens, [pixels], None, None, staging=None, row=0)
        return embeds, blocks[None]

    def logits(self, tokens, pixels):
        """Of what comes behind a picture and these tokens."""
        x, blocks = self.row(tokens, pixels)
        for block in self.model.text["blocks"]:
            block.kv_cache = Cache()
        paging = dict.fromkeys(("slot_mapping", "page_table", "paged_kv_seqlens_k"), torch.zeros(1))
        options = {"use_prefix_attn": True, "block_sequence_ids": blocks, "mode": "prefill", **paging}
        positions = torch.arange(x.shape[1])[None]
        x = self.kestrel.text.text_decoder(x, self.model.text, None, positions, self.config.text, **options)
        return self.kestrel.text.lm_head(x, self.model.text)[0].float()


@pytest.fixture
def stand_ins(kestrel, monkeypatch):
    """KERNELS and PILLOW in their places; and nothing is to be trained."""
    for module in (kestrel.layers, kestrel.text, kestrel.vision):
        monkeypatch.setattr(module, "get_runtime", lambda device: KERNELS)
    monkeypatch.setattr(kestrel.crops, "kestrel_native", PILLOW)
    with torch.no_grad():
        yield


def pixels_of(size):
    return np.asarray(Image.open(ROOT / "images" / "valid_001.jpg").resize(size))


@pytest.mark.parametrize("tiling", SIZES, ids=str)
def test_the_engines_features_are_ours(kestrel, saved, own, stand_ins, tiling):
    pixels = pixels_of(SIZES[tiling])
    engine = Engine(kestrel, saved, own.config, torch.float32)
    vision = engine.config.vision
    crops = kestrel.vision.compute_overlap_crops(pixels, vision)
    assert crops["tiling"] == tiling
    ours = own.encode_image(Image.fromarray(pixels))[0]
    torch.testing.assert_close(engine.encode(pixels), ours, atol=1e-5, rtol=1e-5)


def test_bos_is_of_the_block_whose_positions_see_each_other(kestrel, saved, own, asked, stand_ins):
    tokens, _ = ask(kestrel, asked, "query", question="Why?", reasoning=False)
    embeds, blocks = Engine(kestrel, saved, own.config, torch.float32).row(tokens, pixels_of((100, 60)))
    prefix, rest = own.config.prefix_tokens, len(tokens) - 1
    assert blocks.tolist() == [[0] * prefix + [-1] * rest] and embeds.shape[1] == prefix + rest


@pytest.mark.parametrize("size", SIZES.values(), ids=str)
def test_the_engines_logits_and_answers_are_ours(kestrel, saved, own, tokenizer, asked, stand_ins, size):
    """In float16, of which its attention wants to be; 3 at most is an answer's first, and never, in the engine."""
    engine, pixels = Engine(kestrel, saved, own.config, torch.float16), pixels_of(size)
    embeds = own.encode_image(Image.fromarray(pixels))
    for question in QUESTIONS[:3]:
        tokens, state = ask(kestrel, asked, "query", question=question, reasoning=False)
        (((ids, _),),) = own.generate_ids(embeds, [own.config.prompt_ids([question], tokenizer)], 0, 0, 8)
        text = type(tokens[0])
        answer = []
        for _ in ids:
            ours = own(input_ids=torch.tensor([[token.token_id for token in tokens]]), image_embeds=embeds).logits[
                0, -1
            ]
            logits = engine.logits(tokens, pixels)
            torch.testing.assert_close(logits, ours, atol=0.01, rtol=0)
            logits[state.suppressed_token_ids(asked)] = float("-inf")
            answer.append(logits.argmax().item())
            tokens = [*tokens, text(answer[-1])]
        assert answer == ids


# ---------------------------------------------------------------------------------------------------------------------
# On a card
# ---------------------------------------------------------------------------------------------------------------------


def test_what_docs_tell_to_type_is_there(kestrel):
    """The client hands its keywords to RuntimeConfig, and `query`'s to the engine's."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    told = re.search(r"md\.photon\(\s*\"(\w+)\",(.+?)\)\n", page, re.S)
    assert told[1] == kestrel.spec.name
    fields = {field.name for field in dataclasses.fields(kestrel.settings.RuntimeConfig)}
    assert set(re.findall(r"(\w+)=", told[2])) == {"model_path", "tokenizer_path"} <= fields
    arguments = inspect.signature(kestrel.engine.InferenceEngine.query).parameters
    assert {"image", "question", "reasoning", "settings"} <= arguments.keys()


@pytest.mark.skipif(
    not torch.cuda.is_available() or "MOONDREAM2_2025" not in os.environ,
    reason="needs an NVIDIA card, and in MOONDREAM2_2025 the folder of a saved model of full size",
)
def test_on_a_card_the_engine_answers_as_we_do(kestrel):
    folder, lines = Path(os.environ["MOONDREAM2_2025"]), lines_of("valid.jsonl")
    pictures = [ROOT / line["image_path"] for line in lines]

    async def serve():
        paths = {"model_path": folder / "model.safetensors", "tokenizer_path": folder / "tokenizer.json"}
        settings = kestrel.settings.RuntimeConfig(model=kestrel.spec.name, **paths)
        engine = await kestrel.engine.InferenceEngine.create(settings)
        try:
            options = {"reasoning": False, "settings": {"temperature": 0}}
            questions = [
                engine.query(image=picture.read_bytes(), question=line["question"], **options)
                for picture, line in zip(pictures, lines, strict=True)
            ]
            return [result.output["answer"].strip() for result in await asyncio.gather(*questions)]
        finally:
            await engine.shutdown()

    served = asyncio.run(serve())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().cuda()
    ours = [
        model.query(Image.open(picture), line["question"])["answer"]
        for picture, line in zip(pictures, lines, strict=True)
    ]
    same = sum(each == other for each, other in zip(served, ours, strict=True))
    print(f"{same} of {len(ours)} answers are the same")
    assert same >= 0.9 * len(ours)
