"""Moondream2, release 2024-08-26, for transformers' Auto classes.

The whole network in reading order: configuration, picture, vision encoder, text model, Moondream. The parameters carry
the release's names, so its weights load here and what is saved here loads there. Importing this file registers the
classes: `AutoModelForCausalLM.from_pretrained("vikhyatk/moondream2", revision=...)` then runs no code of the hub.

Sources: SigLIP (https://arxiv.org/abs/2303.15343), Phi-1.5 (https://arxiv.org/abs/2309.05463), rotary positions
(https://arxiv.org/abs/2104.09864).
"""

import weakref
from functools import cached_property, wraps
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: the defaults are the released model
# ---------------------------------------------------------------------------------------------------------------------


class MoondreamVisionConfig(PretrainedConfig):
    """The vision encoder (SigLIP so400m) and its projection into the text model's width."""

    model_type = "moondream1_vision"
    defaults = {
        "image_size": 378,  # pixels a side of what the ViT sees at a time
        "patch_size": 14,
        "tile_from": 512,  # a picture whose longer side is under this many pixels is seen whole, without tiles
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "projection_size": 8192,
        "layer_norm_eps": 1e-5,
    }

    def __init__(self, **kwargs):
        super().__init__(**{**self.defaults, **kwargs})


class MoondreamTextConfig(PretrainedConfig):
    """The text model (Phi-1.5)."""

    model_type = "phi"
    defaults = {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "rotary_dim": 32,  # how many of a head's dimensions turn with the position
        "rotary_theta": 10000.0,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    }

    def __init__(self, **kwargs):
        kwargs["tie_word_embeddings"] = False
        super().__init__(**{**self.defaults, **kwargs})


class MoondreamConfig(PretrainedConfig):
    """Moondream2. `text_config` and `vision_config` take a dictionary of the fields that differ from the release."""

    model_type = "moondream1"
    # What transformers once set in any configuration, people still give to `from_pretrained`.
    pad_token_id = bos_token_id = eos_token_id = None
    use_cache = True
    sub_configs = {"text_config": MoondreamTextConfig, "vision_config": MoondreamVisionConfig}

    def __init__(self, text_config=None, vision_config=None, region_features=256, **kwargs):
        self.text_config = self._sub_config(MoondreamTextConfig, text_config)
        self.vision_config = self._sub_config(MoondreamVisionConfig, vision_config)
        self.region_features = region_features
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @staticmethod
    def _sub_config(config_class, value):
        return value if isinstance(value, config_class) else config_class(**(value or {}))

    @property
    def image_tokens(self):
        """How many embeddings a picture becomes: 729."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# Picture -> tensor
# ---------------------------------------------------------------------------------------------------------------------

PIXELS_VERSION = 2  # raise it whenever preprocess() gives other pixels: what is kept of the old ones is then left alone
MAX_PIXELS = 2**30 // 12  # 89 million, from which on Pillow warns: a JPEG of more is decoded at half width and height


def decode_smaller(image):
    """Makes of a JPEG with more than MAX_PIXELS, if it is not decoded yet, one of half its width and height."""
    if image.width * image.height > MAX_PIXELS:
        image.draft(None, (image.width // 2, image.height // 2))


def upright_rgb(image):
    """The picture as a person sees it: turned upright by its EXIF orientation, 8 bits a channel, on white, RGB."""
    decode_smaller(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel: convert() would clip them at 255
        image = Image.fromarray(to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_8_bits(values):
    """Grey values (height, width) of more than 8 bits, as uint8; what is below 0 is black.

    Integers are of 8, 10, 12, 14, 16 or as many more bits as hold the brightest: a file doesn't say how many its camera
    had. Floats go from 0 to 1 or, where one is above 1, to 255; NaN is black.
    """
    if values.dtype.kind == "f":
        white = 1 if values[np.isfinite(values)].max(initial=0) <= 1 else 255
        values = np.nan_to_num(values, nan=0, posinf=white, neginf=0).clip(0, white)
        return np.rint(values * (255 // white)).astype(np.uint8)
    brightest = int(values.max())
    bits = next((bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits), brightest.bit_length())
    values = values.clip(0).astype(np.int64)
    values *= 255
    values //= 2**bits - 1
    return values.astype(np.uint8)


def preprocessed_size(width, height, image_size=378, tile_from=512):
    """The (height, width) that a picture of `width` x `height` pixels is resized to: one tile, two or four."""
    if max(width, height) < tile_from:
        return image_size, image_size
    one, two = image_size, 2 * image_size
    # The second term crosses height and width. The release was trained so; min() keeps its order at ties.
    return min(
        [(one, one), (one, two), (two, one), (two, two)],
        key=lambda size: (
            abs(size[1] / size[0] - width / height),
            abs(size[0] - width) + abs(size[1] - height),
        ),
    )


def preprocess(image, image_size=378, tile_from=512):
    """A PIL image -> float32 (3, height, width) in [-1, 1], sides of one or two times `image_size`."""
    image = upright_rgb(image)
    height, width = preprocessed_size(*image.size, image_size, tile_from)
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC)))
    return rearrange(pixels, "h w c -> c h w").float().div(255).sub(0.5).div(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Vision encoder: pictures -> (pictures, 729, 2048)
# ---------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), which keeps GELU's input and not its output: a quarter less to keep of a training step."""

    def __init__(self, in_features, hidden_features, out_features):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)
        self.gradient_checkpointing = False  # True by transformers where the whole layer is computed again

    def forward(self, x):
        x = self.fc1(x)
        activated = F.gelu(x, approximate="tanh")
        # A compiler decides by itself what it computes again, and a layer that is computed again keeps nothing.
        if not x.requires_grad or self.gradient_checkpointing or torch.compiler.is_compiling():
            return self.fc2(activated)
        with gelu_again(activated, x):
            return self.fc2(activated)


def gelu_again(activated, x):
    """Within it, `activated` = gelu(x) is not kept for the backward pass: there it is computed again, of `x`."""
    x = Keep.apply(x).grad_fn
    activated = weakref.ref(activated)  # autograd holds on to `pack`

    def pack(tensor):
        return tensor.shape if tensor is activated() or tensor._base is activated() else tensor

    def unpack(kept):
        return kept if torch.is_tensor(kept) else F.gelu(*x.saved_tensors, approximate="tanh").view(kept)

    return saved_tensors_hooks(pack, unpack)


class Keep(torch.autograd.Function):
    """Keeps a tensor as any layer would, that is, in the hands of a checkpoint around it, if there is one."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = VisionAttention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchLinear(nn.Module):
    """nn.Linear by another name, which no quantizer takes: its 588 inputs are not a multiple of what theirs want."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight, self.bias = nn.Linear(in_features, out_features).parameters()

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.patch_size = patch_size
        self.linear = PatchLinear(3 * patch_size**2, width)

    def forward(self, x):  # (b, 3, 378, 378) -> (b, 729, width)
        p = self.patch_size
        return self.linear(rearrange(x, "b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=p, p2=p))


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.image_size // config.patch_size) ** 2, width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x):
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def device_of(parameter):
    """Where what meets it is put: the CPU where accelerate has offloaded it, and moves both when they meet."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


class VisionEncoder(nn.Module):
    """The whole picture and its tiles through one ViT; both views of a place, side by side, into the text's width."""

    def __init__(self, config):
        super().__init__()
        vision = config.vision_config
        self.image_size, self.tile_from = vision.image_size, vision.tile_from
        self.encoder = nn.ModuleDict({"model": nn.ModuleDict({"visual": VisionTransformer(vision)})})
        self.projection = nn.ModuleDict(
            {"mlp": MLP(2 * vision.hidden_size, vision.projection_size, config.text_config.hidden_size)}
        )

    def preprocess(self, image):
        return preprocess(image, self.image_size, self.tile_from)

    def forward(self, images):
        """A PIL image, a list of PIL images or preprocessed tensors, or a tensor (b, 3, h, w) -> (b, 729, 2048)."""
        images = [images] if isinstance(images, Image.Image) else images
        like = self.encoder.model.visual.pos_embed  # not a layer's weight, which may be quantized
        pixels = [x if torch.is_tensor(x) else self.preprocess(x) for x in images]
        # CUDA keeps what it copies from until it has; other devices may not.
        pixels = [x.to(device_of(like), like.dtype, non_blocking=like.is_cuda) for x in pixels]
        whole = torch.cat([self._resize(x[None], self.image_size) for x in pixels])
        tiles = [self._tiles(x) for x in pixels]
        features = self.encoder.model.visual(torch.cat([whole, *tiles]))
        whole, *local = features.split([len(pixels), *map(len, tiles)])
        local = torch.stack([self._lay_side_by_side(*each) for each in zip(local, pixels, whole, strict=True)])
        return self.projection.mlp(torch.cat([whole, local], dim=-1))

    def _tiles(self, pixels):
        """(3, h, w) -> (tiles, 3, 378, 378) in raster order; none of a picture that is one tile itself."""
        tiles = rearrange(pixels, "c (i h) (j w) -> (i j) c h w", h=self.image_size, w=self.image_size)
        return tiles if len(tiles) > 1 else tiles[:0]

    def _lay_side_by_side(self, tiles, pixels, whole):
        """The tiles' features (tiles, 729, width), laid as the tiles lie, as one map of 27 x 27: (729, width)."""
        if not len(tiles):
            return whole
        side = int(tiles.shape[1] ** 0.5)
        rows = pixels.shape[1] // self.image_size
        features = rearrange(tiles, "(i j) (h w) c -> 1 c (i h) (j w)", i=rows, h=side)
        return rearrange(self._resize(features, side), "1 c h w -> (h w) c")

    @staticmethod
    def _resize(x, side):
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# Text model: token ids and image embeddings -> logits
# ---------------------------------------------------------------------------------------------------------------------


def rotary_angles(position_ids, dim, theta):
    """cos and sin (batch, 1, tokens, dim / 2) of each position's angles. Float32: bfloat16 can't tell 700 from 701."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim)
    angles = position_ids[:, None, :, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns the first 2 * cos.shape[-1] dimensions of x (batch, heads, tokens, dim), pairing each half's i-th ones."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = a.float(), b.float()
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def eager_attention(q, k, v, attn_mask, is_causal):
    """What F.scaled_dot_product_attention computes, written out; `attn_mask` is boolean."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


class TextAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.heads, self.layer = config, config.num_attention_heads, layer
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, mask, cache, positions=None):
        q, k, v = rearrange(self.Wqkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = v.contiguous()  # a view would keep all of Wqkv's output alive until the backward pass
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attend = eager_attention if self.config._attn_implementation == "eager" else F.scaled_dot_product_attention
        x = attend(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.out_proj(at(positions, rearrange(x, "b h t d -> b t (h d)")))


def at(positions, x):
    """x (batch, tokens, width) at n of its batch x tokens positions, (n, width); all of x where `positions` is None."""
    return x if positions is None else x.flatten(0, 1)[positions]


class TextBlock(nn.Module):
    """x + attention(ln(x)) + mlp(ln(x)): one norm feeds both. Only `positions` come out, where they are given."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = TextAttention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x, cos, sin, mask, cache, positions=None):
        h = self.ln(x)
        return at(positions, x) + self.mixer(h, cos, sin, mask, cache, positions) + self.mlp(at(positions, h))


def attention_mask_4d(mask, tokens, past, device):
    """A boolean (batch or 1, 1, tokens, past + tokens), True where attention goes; None where causal says it all.

    `mask` is None, 2-D (batch, past + tokens) with 0 at padding, or already 4-D.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    if mask is None and (past == 0 or tokens == 1):
        return None
    causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
    if mask is None:
        return causal[None, None]
    # Padding sees itself: a softmax over nothing would be NaN, and NaN spreads.
    itself = torch.eye(past + tokens, dtype=torch.bool, device=device)[past:]
    return (causal & mask.bool()[:, None, None, :]) | itself


class Pretrained(PreTrainedModel):
    """What both models here say of themselves to transformers, accelerate and peft."""

    _supports_sdpa = True
    _supports_flash_attn = _supports_flash_attn_2 = True  # by the kernel of torch's own, which SDPA takes where it can
    _supports_cache_class = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["TextBlock", "VisionBlock"]
    _skip_keys_device_placement = ["past_key_values"]

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        attn_implementation = "sdpa" if attn_implementation == "flash_attention_2" else attn_implementation
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _check_and_enable_flash_attn_2(cls, config, **kwargs):  # the same, in older releases of transformers
        config._attn_implementation = "sdpa"
        return config


class TextModel(Pretrained, GenerationMixin):
    """Phi-1.5, of which transformers' `generate` takes token ids or embeddings."""

    config_class = MoondreamTextConfig
    adapter_targets = ("Wqkv", "out_proj", "fc1", "fc2")  # the names of the layers that LORA_RANK puts adapters on

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.transformer = nn.ModuleDict(
            {
                "embd": nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, width)}),
                "h": nn.ModuleList(TextBlock(config, layer) for layer in range(config.num_hidden_layers)),
            }
        )
        self.lm_head = nn.ModuleDict(
            {"ln": nn.LayerNorm(width, eps=config.layer_norm_eps), "linear": nn.Linear(width, config.vocab_size)}
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embd.wte

    def get_output_embeddings(self):
        return self.lm_head.linear

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        image_embeds=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        labels=None,
        num_items_in_batch=None,
        logits_to_keep=0,
        output_hidden_states=None,
        answer_positions=None,
        **kwargs,
    ):
        """Logits (batch, tokens, vocabulary) and, with labels, their cross-entropy in float32.

        Args:
            input_ids: (batch, tokens); or inputs_embeds: (batch, tokens, width).
            image_embeds: (batch, 729, width), put after the first token; `tokens` below counts them.
            attention_mask: 2-D (batch, past + tokens), 0 at padding, or 4-D boolean, True where attention goes.
            position_ids: (batch, tokens). Without it, tokens that are not padding are counted.
            past_key_values: a transformers Cache to go on from; `use_cache` alone starts one.
            labels: (batch, tokens), as in transformers: -100 where nothing is to be learned, not shifted.
            num_items_in_batch: what the summed loss is divided by. Without it, the number of labels.
            logits_to_keep: of the last so many tokens only; 0 for all. Not to be given with labels.
            output_hidden_states: returns what each layer was given, and what `lm_head.linear` is.
            answer_positions: (n,) of the batch x tokens positions, counted through. Only these leave the last layer's
                attention for its MLP and `lm_head`, and logits are (n, vocabulary). Not to be given with labels.
            kwargs: what transformers hands to any model and this one has no use for, such as `cache_position`.
        """
        x = self.transformer.embd.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if image_embeds is not None:
            x = torch.cat([x[:, :1], image_embeds.to(x.device, x.dtype), x[:, 1:]], dim=1)
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.get_seq_length()
        states = [] if output_hidden_states else None
        x = self._hidden_states(x, attention_mask, position_ids, cache, past, answer_positions, states)
        x = self.lm_head.ln(x)
        logits, loss = self.lm_head.linear(x[:, -logits_to_keep:]), None  # all of x where it is 0
        if labels is not None:
            predicted, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
            items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(predicted, labels, reduction="sum") / items
        states = states and (*states, x)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)

    def _hidden_states(self, x, attention_mask, position_ids, cache, past, answer_positions, states):
        tokens = x.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=x.device)[None]
        cos, sin = rotary_angles(position_ids, self.config.rotary_dim, self.config.rotary_theta)
        mask = attention_mask_4d(attention_mask, tokens, past, x.device)
        for block in self.transformer.h:
            if states is not None:
                states.append(x)
            positions = answer_positions if block is self.transformer.h[-1] else None
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, cos, sin, mask, None, positions)
            else:
                x = block(x, cos, sin, mask, cache, positions)
        return x


class RegionModel(nn.Module):
    """The release's weights for pointing at regions, carried along unchanged: they take no part in answering."""

    def __init__(self, config):
        super().__init__()
        width, features = config.text_config.hidden_size, config.region_features
        for name in ("position", "size"):
            fourier = nn.Module()
            fourier.register_buffer("weight", torch.zeros(features // 2, 2))
            self.add_module(f"{name}_features", fourier)
            self.add_module(f"{name}_encoder", nn.Linear(features, width))
            self.add_module(f"{name}_decoder", nn.Linear(width, 2))
        self.confidence_decoder = nn.Linear(width, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Moondream
# ---------------------------------------------------------------------------------------------------------------------

IMAGE = "<image>"  # the picture's place in a prompt that `generate` or `input_embeds` is given


def prompt_text(question, chat_history=""):
    """What stands between a picture and the answer, which begins with a space."""
    return f"\n\n{chat_history}Question: {question}\n\nAnswer:"


def answer_text(answer):
    """An answer as it follows its prompt; the end-of-text token follows it."""
    return f" {answer}"


def token_ids(texts, tokenizer):
    """The ids of each text. What looks like a special token is text all the same: nobody's words end an answer."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids if texts else []


MAX_NEW_TOKENS = 256  # in an answer of a model whose generation_config.json does not say
NO_TOKEN = -1  # stands behind an answer's end


class Answer(NamedTuple):
    """What the model says, and how probable it finds just this; `is_cut` where it had not come to its end."""

    text: str
    probability: float
    is_cut: bool


def to_answer(ids, probability, tokenizer):
    """The Answer that these token ids are, which end with the end-of-text token unless it was cut."""
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, probability, is_cut=ids[-1] != tokenizer.eos_token_id)


def lay_out_rows(rows, bos, image_tokens):
    """Rows `[BOS, image, prompt 1, answer 1, prompt 2, answer 2, ...]`: a picture, and questions blind to each other.

    Args:
        rows: for each picture a list of (prompt ids, answer ids); an answer may be empty.
    Returns:
        a dictionary, in which `tokens` counts the image's places and positions are counted through rows x tokens:
        input_ids: (rows, tokens - image_tokens), padded with `bos`.
        document_ids: (rows, tokens), 0 for BOS and image, k for question k and its answer, -1 for padding.
        position_ids: (rows, tokens), in which each question starts right behind the image.
        prompt_ends: (rows, questions), the position of each prompt's last token; -1 where a row has fewer questions.
        answer_positions: (answer tokens,), the positions that predict answers' tokens: each stands before its token.
    """
    prefix = 1 + image_tokens
    tokens = prefix + max(sum(len(prompt) + len(answer) for prompt, answer in row) for row in rows)
    input_ids = torch.full((len(rows), tokens - image_tokens), bos)
    document_ids = torch.full((len(rows), tokens), -1)
    document_ids[:, :prefix] = 0
    position_ids = torch.arange(tokens).repeat(len(rows), 1)
    prompt_ends = torch.full((len(rows), max(map(len, rows))), -1)
    answer_positions = []
    for r, row in enumerate(rows):
        start = prefix
        for k, (prompt, answer) in enumerate(row):
            ids = torch.tensor([*prompt, *answer])
            end = start + len(ids)
            input_ids[r, start - image_tokens : end - image_tokens] = ids
            document_ids[r, start:end] = k + 1
            position_ids[r, start:end] = torch.arange(prefix, prefix + len(ids))
            last = r * tokens + start + len(prompt) - 1
            prompt_ends[r, k] = last
            answer_positions.extend(range(last, last + len(answer)))
            start = end
    return {
        "input_ids": input_ids,
        "document_ids": document_ids,
        "position_ids": position_ids,
        "prompt_ends": prompt_ends,
        "answer_positions": torch.tensor(answer_positions, dtype=torch.long),
    }


def row_mask(document_ids, queries=None):
    """Who sees whom in rows of `lay_out_rows`: 4-D boolean for the text model.

    Args:
        document_ids: (rows, tokens).
        queries: (rows, n), the document ids of the newest n tokens, where only these are asked for and no two are of
            one document: a decoding step. Without it every token asks, and sees nothing behind itself.
    """
    keys = document_ids[:, None, None, :]
    if queries is not None:
        return (keys == 0) | (keys == queries[:, None, :, None])
    tokens = document_ids.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=document_ids.device).tril()
    return causal & ((keys == 0) | (keys == document_ids[:, None, :, None]))


class Moondream(Pretrained, GenerationMixin):
    """Moondream2: `vision_encoder`, `text_model`, and `region_model`, which is only carried along.

    Below, `image_embeds` are pictures encoded by `encode_image`. An answer has `max_new_tokens` tokens at most; where
    that is not given, as many as generation_config.json says, or 256. `kwargs` are arguments of transformers'
    `generate`, such as num_beams or streamer; without any, answers are decoded greedily, all at once.
    """

    config_class = MoondreamConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_encoder = VisionEncoder(config)
        self.text_model = TextModel(config.text_config)
        self.region_model = RegionModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.text_model.get_output_embeddings()

    @wraps(TextModel.forward)
    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)

    @torch.no_grad()
    def encode_image(self, image):
        """A picture, a list of them or a preprocessed tensor -> image embeddings (pictures, 729, 2048).

        Embeddings are given back, so that `query` and `caption` take pictures that are encoded already.
        """
        return image if torch.is_tensor(image) and image.dim() == 3 else self.vision_encoder(image)

    def query(self, image, question, tokenizer=None, max_new_tokens=None):
        """{"answer": its text, "probability": of the whole of it}, for a question about a picture."""
        embeds, tokenizer = self.encode_image(image), tokenizer or self._tokenizer
        ((answer,),) = self.answer_questions(embeds, [[question]], tokenizer, max_new_tokens, return_probabilities=True)
        return {"answer": answer.text, "probability": answer.probability}

    def answer_question(
        self,
        image_embeds,
        question,
        tokenizer,
        chat_history="",
        result_queue=None,
        max_new_tokens=None,
        **kwargs,
    ):
        """The answer to a question about one encoded picture (1, 729, 2048); `result_queue` gets it as well."""
        prompt = prompt_text(question, chat_history)
        (answer,) = self._answer_each(image_embeds, [prompt], tokenizer, max_new_tokens, kwargs)
        if result_queue is not None:
            result_queue.put(answer)
        return answer

    def answer_questions(self, image_embeds, questions, tokenizer, max_new_tokens=None, return_probabilities=False):
        """For each encoded picture a list of questions -> for each a list of answers; a picture is read only once.

        With `return_probabilities` an answer is not a text but an `Answer`, with the probability of the whole of it.
        """
        prompts = [[prompt_text(question) for question in row] for row in questions]
        rows = self._answer(image_embeds, prompts, tokenizer, max_new_tokens)
        return rows if return_probabilities else [[answer.text for answer in row] for row in rows]

    def batch_answer(self, images, prompts, tokenizer, max_new_tokens=None, **kwargs):
        """The answers to one question for each picture."""
        prompts = [prompt_text(question) for question in prompts]
        return self._answer_each(self.encode_image(images), prompts, tokenizer, max_new_tokens, kwargs)

    def caption(self, images, tokenizer=None, length=None, max_new_tokens=512, **kwargs):
        """A caption for each picture, a short one with length="short"."""
        image_embeds = self.encode_image(images)
        prompt = "\n\nShort caption:" if length == "short" else "\n\nCaption:"
        prompts = [prompt] * len(image_embeds)
        return self._answer_each(image_embeds, prompts, tokenizer or self._tokenizer, max_new_tokens, kwargs)

    def _answer_each(self, image_embeds, prompts, tokenizer, max_new_tokens, kwargs):
        """A text for each picture's prompt."""
        if not kwargs:
            rows = self._answer(image_embeds, [[prompt] for prompt in prompts], tokenizer, max_new_tokens)
            return [answer.text for (answer,) in rows]
        most = self._most_new_tokens(max_new_tokens)
        return [
            self.generate(embeds[None], f"{IMAGE}{prompt}", tokenizer, most, **kwargs)[0].strip()
            for embeds, prompt in zip(image_embeds, prompts, strict=True)
        ]

    def input_embeds(self, prompt, image_embeds, tokenizer):
        """BOS and a prompt as embeddings (1, tokens, width), with a picture (1, 729, width) where `<image>` stands."""
        before, image, after = prompt.partition(IMAGE)
        before, after = token_ids([before, after], tokenizer)
        wte = self.get_input_embeddings()
        ids = [tokenizer.bos_token_id, *before], after
        ids = (torch.tensor([each], dtype=torch.long, device=device_of(wte.weight)) for each in ids)
        before, after = map(wte, ids)
        return torch.cat([before, image_embeds.to(before), after] if image else [before], dim=1)

    def generate(self, image_embeds=None, prompt=None, tokenizer=None, max_new_tokens=128, **kwargs):
        """A list of the texts that transformers' `generate` writes behind a prompt, see `input_embeds`.

        Without a prompt it is that `generate` itself, as transformers' own tools call it.
        """
        if prompt is None:
            return super().generate(image_embeds, max_new_tokens=max_new_tokens, **kwargs)
        embeds, end = self.input_embeds(prompt, image_embeds, tokenizer), tokenizer.eos_token_id
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        settings = {"eos_token_id": end, "pad_token_id": end, "max_new_tokens": max_new_tokens, **kwargs}
        ids = super().generate(inputs_embeds=embeds, attention_mask=mask, **settings)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    @cached_property
    def _tokenizer(self):
        """The one beside the weights, in the folder or repository that they came from."""
        revision = getattr(self.config, "_commit_hash", None)
        return AutoTokenizer.from_pretrained(self.name_or_path, revision=revision, trust_remote_code=False)

    def _most_new_tokens(self, asked_for):
        return asked_for or self.generation_config.max_new_tokens or MAX_NEW_TOKENS

    def _answer(self, image_embeds, prompts, tokenizer, max_new_tokens):
        ids = [token_ids(row, tokenizer) for row in prompts]
        rows = self.generate_ids(image_embeds, ids, tokenizer.bos_token_id, tokenizer.eos_token_id, max_new_tokens)
        return [[to_answer(*each, tokenizer) for each in row] for row in rows]

    @torch.inference_mode()
    def generate_ids(self, image_embeds, prompts, bos, eos, max_new_tokens=None):
        """Greedy answers to all questions of all rows.

        Args:
            image_embeds: (rows, 729, width).
            prompts: for each row a list of prompts, each a list of token ids.
        Returns:
            for each row a list of what `decode` says of an answer.
        """
        device = device_of(self.get_input_embeddings().weight)
        rows = lay_out_rows([[(prompt, []) for prompt in row] for row in prompts], bos, image_embeds.shape[1])
        rows = {name: tensor.to(device) for name, tensor in rows.items()}
        out = self(
            input_ids=rows["input_ids"],
            image_embeds=image_embeds,
            attention_mask=row_mask(rows["document_ids"]),
            position_ids=rows["position_ids"],
            answer_positions=rows["prompt_ends"].clamp(min=0).flatten(),
            use_cache=True,
        )
        first = out.logits.unflatten(0, rows["prompt_ends"].shape)
        answers = self.decode(first, rows, out.past_key_values, eos, max_new_tokens)
        return [row[: len(prompt)] for row, prompt in zip(answers, prompts, strict=True)]

    @torch.inference_mode()
    def decode(self, first, rows, cache, eos, max_new_tokens=None, asked=None):
        """Goes on greedily with all questions of all rows at once: a step costs one token for each question.

        Args:
            first: (rows, questions, vocabulary), the logits of each answer's first token.
            rows: of `lay_out_rows`, on the model's device, which the text model has read; their own answers, if they
                have any, stay unseen.
            cache: the keys and values of what it has read.
            asked: (rows, questions), True where an answer is wanted; all where None.
        Returns:
            for each row a list of (token ids, probability of all of them): `eos` is the last unless the answer was
            cut, after `max_new_tokens` or at the last position; no ids where none was wanted.
        """
        most = self._most_new_tokens(max_new_tokens)
        ends = rows["prompt_ends"]
        done = ends < 0 if asked is None else (ends < 0) | ~asked
        position_ids = rows["position_ids"].flatten()[ends.clamp(min=0)] + 1
        is_answer = rows["answer_positions"] + 1
        document_ids = rows["document_ids"].flatten().index_fill(0, is_answer, -1).view_as(rows["document_ids"])
        questions = torch.arange(1, ends.shape[1] + 1, device=ends.device).expand_as(ends)
        logits, answers, log_probability = first, [], torch.zeros(ends.shape, device=ends.device)
        while True:
            token = logits.argmax(-1)
            chosen = logits.float().log_softmax(-1).gather(-1, token[..., None])[..., 0]
            log_probability += chosen.masked_fill(done, 0)
            answers.append(token.masked_fill(done, NO_TOKEN))
            done = done | (token == eos) | (position_ids >= self.config.text_config.max_position_embeddings)
            if len(answers) == most or done.all():
                break
            document_ids = torch.cat([document_ids, questions], dim=1)
            out = self(
                input_ids=token,  # what comes after an answer's end is read, and not used
                attention_mask=row_mask(document_ids, questions),
                position_ids=position_ids,
                past_key_values=cache,
            )
            logits, position_ids = out.logits, position_ids + 1
        answers, probability = torch.stack(answers, dim=-1).tolist(), log_probability.exp().tolist()
        return [
            [([token for token in ids if token != NO_TOKEN], share) for ids, share in zip(*row, strict=True)]
            for row in zip(answers, probability, strict=True)
        ]


AutoConfig.register(MoondreamConfig.model_type, MoondreamConfig, exist_ok=True)
AutoModelForCausalLM.register(MoondreamConfig, Moondream, exist_ok=True)
MoondreamConfig.register_for_auto_class()
Moondream.register_for_auto_class("AutoModelForCausalLM")
