"""Moondream2, releases 2024-08-26 and 2025-06-21, for transformers' Auto classes.

First what both have: the text model's configuration, pictures, layers, text model, rows of questions, `Release`. Then
each release in reading order: configuration, picture, vision encoder, text model, Moondream. The parameters carry the
release's names, so its weights load here and what is saved here loads there. Importing this file registers the classes:
`AutoModelForCausalLM.from_pretrained("vikhyatk/moondream2", revision=...)` then runs no code of the hub.

Sources: SigLIP (https://arxiv.org/abs/2303.15343), Phi-1.5 (https://arxiv.org/abs/2309.05463), rotary positions
(https://arxiv.org/abs/2104.09864).
"""

import math
import weakref
from functools import cached_property, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
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
from transformers.utils import cached_file, can_return_tuple

# ---------------------------------------------------------------------------------------------------------------------
# What both releases have: configuration of the text model, of a release
# ---------------------------------------------------------------------------------------------------------------------


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
        "two_way_prefix": False,  # True: BOS and picture see each other in both directions, and not only backwards
    }

    def __init__(self, **kwargs):
        kwargs["tie_word_embeddings"] = False
        super().__init__(**{**self.defaults, **kwargs})


class ReleaseConfig(PretrainedConfig):
    """What a release has to say before its model is there: the form of its texts, and where its tokenizer is.

    A release has `text_config`, a MoondreamTextConfig, and `vision_config` with image_size and patch_size; both take a
    dictionary of the fields that differ from what was released. `Release` tells what its model offers.
    """

    model_type = "moondream1"
    # What transformers once set in any configuration, people still give to `from_pretrained`.
    pad_token_id = bos_token_id = eos_token_id = None
    use_cache = True
    barred_token = None  # a token that no answer has but as its first
    has_tiles = True  # large pictures are seen in tiles as well, and not in one view alone
    can_leave_out_tiles = False  # `leave_out_tiles` makes it so that they aren't

    def __init__(self, text_config=None, vision_config=None, **kwargs):
        for name, value in (("text_config", text_config), ("vision_config", vision_config)):
            sub_config = self.sub_configs[name]
            setattr(self, name, value if isinstance(value, PretrainedConfig) else sub_config(**(value or {})))
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Both releases have one `model_type`: `architectures` tells which it is."""
        if config_dict.get("architectures") == ["HfMoondream"] and not issubclass(cls, HfMoondreamConfig):
            return HfMoondreamConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @property
    def image_tokens(self):
        """How many embeddings a picture becomes: 729."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def prefix_tokens(self):
        """How many positions each row begins with, of BOS and a picture: 730."""
        return 1 + self.image_tokens

    @property
    def max_text_tokens(self):
        """How many positions are left for prompt and answer."""
        return self.text_config.max_position_embeddings - self.prefix_tokens

    def prompt_ids(self, questions, tokenizer):
        """For each question the token ids that stand between a picture and the answer."""
        raise NotImplementedError

    def answer_ids(self, answers, tokenizer):
        """For each answer its token ids, the last of which ends it."""
        raise NotImplementedError

    def load_tokenizer(self, model_id, revision=None):
        """The tokenizer of a model that lies in a folder or a repository of the hub. It brings no code that runs."""
        return AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=False)


# ---------------------------------------------------------------------------------------------------------------------
# Picture -> RGB
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


def to_pixels(image, width, height, resampling):
    """A PIL image, resized -> float32 (3, height, width) in [-1, 1], contiguous: pinned and copied as it is."""
    pixels = torch.from_numpy(np.array(image.resize((width, height), resampling)))
    return rearrange(pixels, "h w c -> c h w").contiguous().float().div(255).sub(0.5).div(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Layers
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


class PatchLinear(nn.Module):
    """nn.Linear by another name, which no quantizer takes: its 588 inputs are not a multiple of what theirs want."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight, self.bias = nn.Linear(in_features, out_features).parameters()

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def patches(x, side):
    """Pictures (b, 3, 378, 378) -> (b, 729, 588), their patches of 14 x 14 pixels."""
    return rearrange(x, "b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=side, p2=side)


def device_of(parameter):
    """Where what meets it is put: the CPU where accelerate has offloaded it, and moves both when they meet."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


def on_device_of(parameter, x):
    """`x` as what is to meet the parameter, of its type. CUDA keeps what it copies from; other devices may not."""
    return x.to(device_of(parameter), parameter.dtype, non_blocking=parameter.is_cuda)


# ---------------------------------------------------------------------------------------------------------------------
# Text model: token ids and image embeddings -> logits
# ---------------------------------------------------------------------------------------------------------------------


def rotary_angles(position_ids, dim, theta):
    """What `rotate` takes, two of (batch, 1, tokens, dim). Float32: bfloat16 can't tell positions 700 and 701 apart."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim)
    angles = position_ids[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turns the first cos.shape[-1] dimensions of x (..., tokens, dim), pairing each half's i-th ones."""
    dim = cos.shape[-1]
    turned, rest = x.split([dim, x.shape[-1] - dim], dim=-1)  # whose backward pass is one kernel, and slices' several
    turned = turned.float()
    turned = turned * cos + turned.roll(dim // 2, dims=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def eager_attention(q, k, v, attn_mask, is_causal):
    """What F.scaled_dot_product_attention computes, written out; `attn_mask` is one that is added."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=q.device).triu(1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def attention(qkv, cos, sin, mask, cache, layer, config):
    """What the queries of (b, t, three h d) find, (b, t, h d); `mask` as of `attention_mask_4d`.

    A picture's part of a row is no matter of masks: without one the fastest kernels can have it.
    """
    q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=config.num_attention_heads)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    v = v.contiguous()  # a view would keep all of qkv alive until the backward pass
    if cache is not None:
        k, v = cache.update(k, v, layer)
    attend = eager_attention if config._attn_implementation == "eager" else F.scaled_dot_product_attention
    prefix = 0 if mask is None else q.shape[2] - mask.shape[2]
    is_causal = True if mask is None and q.shape[2] > 1 else False  # noqa: SIM210, a compiler's condition is no bool
    if not prefix:
        return attend(q, k, v, attn_mask=mask, is_causal=is_causal).transpose(1, 2).flatten(2)
    picture, text = q.split([prefix, q.shape[2] - prefix], dim=2)
    picture = attend(picture, k[:, :, :prefix], v[:, :, :prefix], attn_mask=None, is_causal=not config.two_way_prefix)
    text = attend(text, k, v, attn_mask=mask, is_causal=False)
    return torch.cat([picture.transpose(1, 2), text.transpose(1, 2)], dim=1).flatten(2)


def at(positions, x):
    """x (batch, tokens, width) at n of its batch x tokens positions, (n, width); all of x where `positions` is None."""
    return x if positions is None else x.flatten(0, 1)[positions]


def attention_mask_4d(mask, tokens, past, prefix, like):
    """What is added to attention's scores: (batch or 1, 1, queries, past + tokens); None where causal says it all.

    It is made once for all layers, each of which would keep its own of a boolean one. `mask` is None, 2-D (batch, past
    + tokens) with 0 at padding, 4-D boolean, True where attention goes, or already what is returned. The queries are
    the newest tokens; the first `prefix`, which are none of them, see each other by the release's rule, and are no
    padding. `like` has the type and the device of what goes through the layers.
    """
    if mask is not None and mask.dim() == 4 and mask.is_floating_point():
        return mask
    if mask is None and not prefix and (past == 0 or tokens == 1):
        return None
    if mask is None or mask.dim() == 2:
        causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=like.device).tril(past)[prefix:]
        # Padding sees itself: a softmax over nothing would be NaN, and NaN spreads.
        itself = torch.eye(past + tokens, dtype=torch.bool, device=like.device)[past + prefix :]
        mask = causal[None, None] if mask is None else (causal & mask.bool()[:, None, None, :]) | itself
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(~mask, float("-inf"))


class Pretrained(PreTrainedModel):
    """What both models here say of themselves to transformers, accelerate and peft."""

    _supports_sdpa = True
    _supports_flash_attn = _supports_flash_attn_2 = True  # by the kernel of torch's own, which SDPA takes where it can
    _supports_cache_class = True
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        attn_implementation = "sdpa" if attn_implementation == "flash_attention_2" else attn_implementation
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _check_and_enable_flash_attn_2(cls, config, **kwargs):  # the same, in older releases of transformers
        config._attn_implementation = "sdpa"
        return config


class Phi(Pretrained, GenerationMixin):
    """Phi-1.5, of which transformers' `generate` takes token ids or embeddings.

    A release names its parts: `layers`, each called with (x, cos, sin, mask, cache, positions), `final_norm`,
    `adapter_targets`, the linear layers in each layer, and what transformers asks for, the input and the output
    embeddings.
    """

    config_class = MoondreamTextConfig
    gradient_checkpointing = False

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
        prefix_tokens=None,
        **kwargs,
    ):
        """Logits (batch, tokens, vocabulary) and, with labels, their cross-entropy in float32.

        Args:
            input_ids: (batch, tokens); or inputs_embeds: (batch, tokens, width).
            image_embeds: (batch, 729, width), put after the first token; `tokens` below counts them.
            attention_mask: 2-D (batch, past + tokens), 0 at padding, or 4-D, boolean, True where attention goes, or to
                be added to scores, for the newest tokens; what is before these is taken for BOS and picture, which see
                each other alone.
            position_ids: (batch, tokens). Without it, tokens that are not padding are counted.
            past_key_values: a transformers Cache to go on from; `use_cache` alone starts one.
            labels: (batch, tokens), as in transformers: -100 where nothing is to be learned, not shifted.
            num_items_in_batch: what the summed loss is divided by. Without it, the number of labels.
            logits_to_keep: of the last so many tokens only; 0 for all. Not to be given with labels.
            output_hidden_states: returns what each layer was given, and what the output embeddings are.
            answer_positions: (n,) of the batch x tokens positions, counted through. Only these leave the last layer's
                attention for its MLP and `lm_head`, and logits are (n, vocabulary). Not to be given with labels.
            prefix_tokens: how many tokens are BOS and picture, where a release lets them see each other in both
                directions. Without it, the first and those of `image_embeds`.
            kwargs: what transformers hands to any model and this one has no use for, such as `cache_position`.
        """
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if image_embeds is not None:
            prefix_tokens = 1 + image_embeds.shape[1]
            x = torch.cat([x[:, :1], image_embeds.to(x.device, x.dtype), x[:, 1:]], dim=1)
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.get_seq_length()
        prefix = prefix_tokens if prefix_tokens and self.config.two_way_prefix and not past else 0
        states = [] if output_hidden_states else None
        x = self._hidden_states(x, attention_mask, position_ids, cache, past, prefix, answer_positions, states)
        x = self.final_norm(x)
        logits, loss = self.get_output_embeddings()(x[:, -logits_to_keep:]), None  # all of x where it is 0
        if labels is not None:
            predicted, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
            items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(predicted, labels, reduction="sum") / items
        states = states and (*states, x)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)

    def _hidden_states(self, x, attention_mask, position_ids, cache, past, prefix, answer_positions, states):
        tokens = x.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=x.device)[None]
        cos, sin = rotary_angles(position_ids, self.config.rotary_dim, self.config.rotary_theta)
        mask = attention_mask_4d(attention_mask, tokens, past, prefix, x)
        for block in self.layers:
            if states is not None:
                states.append(x)
            positions = answer_positions if block is self.layers[-1] else None
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, cos, sin, mask, None, positions)
            else:
                x = block(x, cos, sin, mask, cache, positions)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Rows of questions, and answers
# ---------------------------------------------------------------------------------------------------------------------


def token_ids(texts, tokenizer):
    """The ids of each text. What looks like a special token is text all the same: nobody's words end an answer."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids if texts else []


ROOM = 64  # positions by which what is decoded grows: few lengths, for which a GPU has kernels ready
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


def lay_out_rows(rows, bos, image_tokens, multiple=1):
    """Rows `[BOS, image, prompt 1, answer 1, prompt 2, answer 2, ...]`: a picture, and questions blind to each other.

    Args:
        rows: for each picture a list of (prompt ids, answer ids); an answer may be empty.
        multiple: `tokens` is padded to a multiple of it.
    Returns:
        a dictionary, in which `tokens` counts the image's places and positions are counted through rows x tokens:
        input_ids: (rows, tokens - image_tokens), padded with `bos`.
        document_ids: (rows, tokens), 0 for BOS and image, k for question k and its answer, -1 for padding.
        position_ids: (rows, tokens), in which each question starts right behind the image.
        prompt_ends: (rows, questions), the position of each prompt's last token; -1 where a row has fewer questions.
        answer_positions: (answer tokens,), the positions that predict answers' tokens: each stands before its token.
    """
    prefix = 1 + image_tokens
    longest = prefix + max(sum(len(prompt) + len(answer) for prompt, answer in row) for row in rows)
    tokens = up_to_multiple(longest, multiple)
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


def up_to_multiple(number, multiple):
    return math.ceil(number / multiple) * multiple


def row_mask(document_ids, prefix, queries=None):
    """Who sees whom in rows of `lay_out_rows`: 4-D boolean for the text model.

    Args:
        document_ids: (rows, tokens).
        prefix: how many tokens BOS and picture are. The others ask, and see the prefix and what is of their document,
            nothing behind themselves.
        queries: (rows, n), the document ids of the newest n tokens, where only these are asked for and no two are of
            one document: a decoding step.
    """
    keys = document_ids[:, None, None, :]
    if queries is not None:
        return (keys == 0) | (keys == queries[:, None, :, None])
    tokens = document_ids.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=document_ids.device).tril()[prefix:]
    return causal & ((keys == 0) | (keys == document_ids[:, None, prefix:, None]))


class RoomyCache:
    """Keys and values of rows, with room for what is decoded behind them.

    transformers' DynamicCache copies all that was read for each token that is decoded: of ten rows as many bytes as the
    weights have. Here every ROOM tokens make one copy, with room for as many more: zeros, which a mask is to hide.
    """

    def __init__(self):
        self.layers = {}  # of each its keys, its values, and of how many tokens they are

    def get_seq_length(self):
        return next((tokens for _, _, tokens in self.layers.values()), 0)

    def update(self, k, v, layer):
        """Adds those of new tokens (rows, heads, tokens, dim); returns all, from the second call on with their room."""
        if layer not in self.layers:
            self.layers[layer] = k, v, k.shape[2]
            return k, v
        keys, values, read = self.layers[layer]
        new = slice(read, read + k.shape[2])
        if new.stop > keys.shape[2]:
            room = up_to_multiple(new.stop, ROOM) - keys.shape[2]
            keys, values = (F.pad(each, (0, 0, 0, room)) for each in (keys, values))
        keys[:, :, new], values[:, :, new] = k, v
        self.layers[layer] = keys, values, new.stop
        return keys, values


# ---------------------------------------------------------------------------------------------------------------------
# What a release offers
# ---------------------------------------------------------------------------------------------------------------------


class Release(Pretrained, GenerationMixin):
    """What a Moondream2 offers to whoever trains or asks it, in the order of its use.

    A release has a `config_class`, a ReleaseConfig; `vision_encoder`, which is called with pictures and whose
    `preprocess(image)` gives what can be kept of one until then, a tensor or a tuple of tensors, the first of which
    shows the whole picture (3, height, width); `text_model`, a Phi, by the name `text_name` in the model; and answers
    a question by `query`. It knows its tokens, and what is below builds rows of them.

    Below, `image_embeds` are pictures encoded by `encode_image`. An answer has `max_new_tokens` tokens at most; where
    that is not given, as many as generation_config.json says, or 256. `kwargs` are arguments of transformers'
    `generate`, such as num_beams or streamer; without any, answers are decoded greedily, all at once.
    """

    revision = None  # of the hub's repository that the weights came from

    @classmethod
    def from_pretrained(cls, *args, revision="main", **kwargs):
        """As transformers', which sets `name_or_path`: the model remembers `revision`, too, for its tokenizer."""
        loaded = super().from_pretrained(*args, revision=revision, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair by `output_loading_info`
        model.revision = revision
        return loaded

    def get_input_embeddings(self):
        return self.text_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.text_model.get_output_embeddings()

    @wraps(Phi.forward)
    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)

    @torch.no_grad()
    def encode_image(self, image):
        """A picture, a list of them or a preprocessed tensor -> image embeddings (pictures, 729, 2048).

        Embeddings are given back, so that `query` and `caption` take pictures that are encoded already.
        """
        return image if torch.is_tensor(image) and image.dim() == 3 else self.vision_encoder(image)

    def answer_questions(self, image_embeds, questions, tokenizer, max_new_tokens=None, return_probabilities=False):
        """For each encoded picture a list of questions -> for each a list of answers; a picture is read only once.

        With `return_probabilities` an answer is not a text but an `Answer`, with the probability of the whole of it.
        """
        prompts = [self.config.prompt_ids(row, tokenizer) for row in questions]
        rows = self._answer(image_embeds, prompts, tokenizer, max_new_tokens)
        return rows if return_probabilities else [[answer.text for answer in row] for row in rows]

    def _answer(self, image_embeds, prompts, tokenizer, max_new_tokens):
        rows = self.generate_ids(image_embeds, prompts, tokenizer.bos_token_id, tokenizer.eos_token_id, max_new_tokens)
        return [[to_answer(*each, tokenizer) for each in row] for row in rows]

    def _answer_each(self, image_embeds, prompts, tokenizer, max_new_tokens, kwargs):
        """A text for each picture's prompt, a list of token ids."""
        if not kwargs:
            rows = self._answer(image_embeds, [[prompt] for prompt in prompts], tokenizer, max_new_tokens)
            return [answer.text for (answer,) in rows]
        most = self._most_new_tokens(max_new_tokens)
        return [
            self._continue(self._embed([], prompt, tokenizer, embeds[None]), tokenizer, most, kwargs)[0].strip()
            for embeds, prompt in zip(image_embeds, prompts, strict=True)
        ]

    def _embed(self, before, after, tokenizer, image_embeds=None):
        """BOS and token ids as embeddings (1, tokens, width), with a picture (1, 729, width) between them if given."""
        wte = self.get_input_embeddings()
        ids = [tokenizer.bos_token_id, *before], after
        ids = (torch.tensor([each], dtype=torch.long, device=device_of(wte.weight)) for each in ids)
        before, after = map(wte, ids)
        return torch.cat([before, after] if image_embeds is None else [before, image_embeds.to(before), after], dim=1)

    def _continue(self, embeds, tokenizer, max_new_tokens, kwargs):
        """A list of the texts that transformers' `generate` writes behind embeddings that begin with a picture."""
        end = tokenizer.eos_token_id
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        settings = {"eos_token_id": end, "pad_token_id": end, "max_new_tokens": max_new_tokens, **kwargs}
        prefix = {"prefix_tokens": self.config.prefix_tokens} if self.config.text_config.two_way_prefix else {}
        if self.config.barred_token is not None:
            settings["logits_processor"] = [*settings.get("logits_processor", []), self._bar]
        ids = GenerationMixin.generate(self, inputs_embeds=embeds, attention_mask=mask, **prefix, **settings)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _bar(self, ids, scores):
        """As of transformers' LogitsProcessor: `ids` (answers, tokens so far), `scores` (answers, vocabulary)."""
        if ids.shape[1]:
            scores[:, self.config.barred_token] = float("-inf")
        return scores

    @cached_property
    def _tokenizer(self):
        """The one that belongs to the folder, or the revision of a repository, that the weights came from."""
        return self.config.load_tokenizer(self.name_or_path, self.revision)

    def _most_new_tokens(self, asked_for):
        return asked_for or self.generation_config.max_new_tokens or MAX_NEW_TOKENS

    @torch.inference_mode()
    def generate_ids(self, image_embeds, prompts, bos, eos, max_new_tokens=None):
        """Greedy answers to all questions of all rows.

        Args:
            image_embeds: (rows, 729, width), or None of no picture.
            prompts: for each row a list of prompts, each a list of token ids.
        Returns:
            for each row a list of what `decode` says of an answer.
        """
        device = device_of(self.get_input_embeddings().weight)
        image_tokens = 0 if image_embeds is None else image_embeds.shape[1]
        rows = lay_out_rows([[(prompt, []) for prompt in row] for row in prompts], bos, image_tokens)
        rows = {name: tensor.to(device) for name, tensor in rows.items()}
        out = self(
            input_ids=rows["input_ids"],
            image_embeds=image_embeds,
            attention_mask=row_mask(rows["document_ids"], 1 + image_tokens),
            position_ids=rows["position_ids"],
            answer_positions=rows["prompt_ends"].clamp(min=0).flatten(),
            past_key_values=RoomyCache(),
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
            cache: a RoomyCache of what it has read.
            asked: (rows, questions), True where an answer is wanted; all where None.
        Returns:
            for each row a list of (token ids, probability of all of them): `eos` is the last unless the answer was
            cut, after `max_new_tokens` or at the last position; no ids where none was wanted.
        """
        most, barred = self._most_new_tokens(max_new_tokens), self.config.barred_token
        ends = rows["prompt_ends"]
        done = ends < 0 if asked is None else (ends < 0) | ~asked
        position_ids = rows["position_ids"].flatten()[ends.clamp(min=0)] + 1
        is_answer = rows["answer_positions"] + 1
        document_ids = rows["document_ids"].flatten().index_fill(0, is_answer, -1).view_as(rows["document_ids"])
        questions = torch.arange(1, ends.shape[1] + 1, device=ends.device).expand_as(ends)
        read, logits, answers = document_ids.shape[1], first, []
        log_probability = torch.zeros(ends.shape, device=ends.device)
        while True:
            token = logits.argmax(-1)
            chosen = logits.float().log_softmax(-1).gather(-1, token[..., None])[..., 0]
            log_probability += chosen.masked_fill(done, 0)
            answers.append(token.masked_fill(done, NO_TOKEN))
            done = done | (token == eos) | (position_ids >= self.config.text_config.max_position_embeddings)
            if len(answers) == most or done.all():
                break
            # As wide as the cache: what is not written yet is of no document.
            room = up_to_multiple(read + questions.shape[1], ROOM) - document_ids.shape[1]
            document_ids = F.pad(document_ids, (0, max(0, room)), value=-1)
            document_ids[:, read : read + questions.shape[1]] = questions
            read += questions.shape[1]
            out = self(
                input_ids=token,  # what comes after an answer's end is read, and not used
                attention_mask=row_mask(document_ids, 0, questions),
                position_ids=position_ids,
                past_key_values=cache,
            )
            logits, position_ids = out.logits, position_ids + 1
            if barred is not None:
                logits[..., barred] = float("-inf")
        answers, probability = torch.stack(answers, dim=-1).tolist(), log_probability.exp().tolist()
        return [
            [([token for token in ids if token != NO_TOKEN], share) for ids, share in zip(*row, strict=True)]
            for row in zip(answers, probability, strict=True)
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Release 2024-08-26: configuration
# ---------------------------------------------------------------------------------------------------------------------


class MoondreamVisionConfig(PretrainedConfig):
    """The vision encoder (SigLIP so400m) and its projection into the text model's width."""

    model_type = "moondream1_vision"
    defaults = {
        "image_size": 378,  # pixels a side of what the ViT sees at a time
        "patch_size": 14,
        "tile_from": 512,  # pixels of its longer side, from which a picture is seen in tiles as well; None: never
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "projection_size": 8192,
        "layer_norm_eps": 1e-5,
    }

    def __init__(self, **kwargs):
        super().__init__(**{**self.defaults, **kwargs})


class MoondreamConfig(ReleaseConfig):
    """Moondream2 of 2024-08-26: the defaults are the released model."""

    sub_configs = {"text_config": MoondreamTextConfig, "vision_config": MoondreamVisionConfig}
    can_leave_out_tiles = True

    def __init__(self, text_config=None, vision_config=None, region_features=256, **kwargs):
        self.region_features = region_features
        super().__init__(text_config, vision_config, **kwargs)

    @property
    def has_tiles(self):
        return self.vision_config.tile_from is not None

    def leave_out_tiles(self):
        self.vision_config.tile_from = None

    def prompt_ids(self, questions, tokenizer):
        return token_ids([prompt_text(question) for question in questions], tokenizer)

    def answer_ids(self, answers, tokenizer):
        ids = token_ids([answer_text(answer) if answer else "" for answer in answers], tokenizer)
        return [[*each, tokenizer.eos_token_id] for each in ids]


def prompt_text(question, chat_history=""):
    """What stands between a picture and the answer, which begins with a space."""
    return f"\n\n{chat_history}Question: {question}\n\nAnswer:"


def answer_text(answer):
    """An answer as it follows its prompt; the end-of-text token follows it."""
    return f" {answer}"


# ---------------------------------------------------------------------------------------------------------------------
# Release 2024-08-26: picture -> tensor
# ---------------------------------------------------------------------------------------------------------------------


def preprocessed_size(width, height, image_size=378, tile_from=512):
    """The (height, width) that a picture of `width` x `height` pixels is resized to: one tile, two or four."""
    if tile_from is None or max(width, height) < tile_from:
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
    return to_pixels(image, width, height, Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Release 2024-08-26: vision encoder, pictures -> (pictures, 729, 2048)
# ---------------------------------------------------------------------------------------------------------------------


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


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.patch_size = patch_size
        self.linear = PatchLinear(3 * patch_size**2, width)

    def forward(self, x):  # (b, 3, 378, 378) -> (b, 729, width)
        return self.linear(patches(x, self.patch_size))


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
        pixels = [on_device_of(like, x) for x in pixels]
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
# Release 2024-08-26: text model
# ---------------------------------------------------------------------------------------------------------------------


class TextAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, mask, cache, positions=None):
        x = attention(self.Wqkv(x), cos, sin, mask, cache, self.layer, self.config)
        return self.out_proj(at(positions, x))


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


class TextModel(Phi):
    """The release's names for the parts of a Phi."""

    _no_split_modules = ["TextBlock"]
    adapter_targets = ("Wqkv", "out_proj", "fc1", "fc2")

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
        self.post_init()

    @property
    def layers(self):
        return self.transformer.h

    @property
    def final_norm(self):
        return self.lm_head.ln

    def get_input_embeddings(self):
        return self.transformer.embd.wte

    def get_output_embeddings(self):
        return self.lm_head.linear


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
# Release 2024-08-26: Moondream
# ---------------------------------------------------------------------------------------------------------------------

IMAGE = "<image>"  # the picture's place in a prompt that `generate` or `input_embeds` is given


class Moondream(Release):
    """Moondream2: `vision_encoder`, `text_model`, and `region_model`, which is only carried along."""

    config_class = MoondreamConfig
    text_name = "text_model"
    _no_split_modules = ["TextBlock", "VisionBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.vision_encoder = VisionEncoder(config)
        self.text_model = TextModel(config.text_config)
        self.region_model = RegionModel(config)
        self.post_init()

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
        prompts = token_ids([prompt_text(question, chat_history)], tokenizer)
        (answer,) = self._answer_each(image_embeds, prompts, tokenizer, max_new_tokens, kwargs)
        if result_queue is not None:
            result_queue.put(answer)
        return answer

    def batch_answer(self, images, prompts, tokenizer, max_new_tokens=None, **kwargs):
        """The answers to one question for each picture."""
        prompts = self.config.prompt_ids(prompts, tokenizer)
        return self._answer_each(self.encode_image(images), prompts, tokenizer, max_new_tokens, kwargs)

    def caption(self, images, tokenizer=None, length=None, max_new_tokens=512, **kwargs):
        """A caption for each picture, a short one with length="short"."""
        image_embeds, tokenizer = self.encode_image(images), tokenizer or self._tokenizer
        prompt = "\n\nShort caption:" if length == "short" else "\n\nCaption:"
        prompts = token_ids([prompt] * len(image_embeds), tokenizer)
        return self._answer_each(image_embeds, prompts, tokenizer, max_new_tokens, kwargs)

    def input_embeds(self, prompt, image_embeds, tokenizer):
        """BOS and a prompt as embeddings (1, tokens, width), with a picture (1, 729, width) where `<image>` stands."""
        before, image, after = prompt.partition(IMAGE)
        return self._embed(*token_ids([before, after], tokenizer), tokenizer, image_embeds if image else None)

    def generate(self, image_embeds=None, prompt=None, tokenizer=None, max_new_tokens=128, **kwargs):
        """A list of the texts that transformers' `generate` writes behind a prompt, see `input_embeds`.

        Without a prompt it is that `generate` itself, as transformers' own tools call it.
        """
        if prompt is None:
            return super().generate(image_embeds, max_new_tokens=max_new_tokens, **kwargs)
        embeds = self.input_embeds(prompt, image_embeds, tokenizer)
        return self._continue(embeds, tokenizer, max_new_tokens, kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Release 2025-06-21: configuration
# ---------------------------------------------------------------------------------------------------------------------


class HfMoondreamVisionConfig(PretrainedConfig):
    """The vision encoder, the same as before, and how a picture is cut into tiles that overlap."""

    model_type = "moondream1_vision"
    defaults = MoondreamVisionConfig.defaults | {
        "overlap_margin": 4,  # patches of a tile that its neighbour sees as well, and better
        "max_tiles": 12,  # long pictures may have more
    }
    del defaults["tile_from"]

    def __init__(self, **kwargs):
        super().__init__(**{**self.defaults, **kwargs})


class HfMoondreamTextConfig(MoondreamTextConfig):
    """The text model, the same as before but for the picture's part of the mask."""

    def __init__(self, **kwargs):
        super().__init__(**{"two_way_prefix": True, **kwargs})


class PreTrainedTokenizerFast(transformers.PreTrainedTokenizerFast):
    """The same by its old name, which all releases of transformers know: it is what a saved tokenizer says it is."""


class HfMoondreamConfig(ReleaseConfig):
    """Moondream2 of 2025-06-21: the defaults are the released model."""

    sub_configs = {"text_config": HfMoondreamTextConfig, "vision_config": HfMoondreamVisionConfig}
    release = None  # what it was loaded from says, if it was saved by this file; the hub's says nothing
    tokens = {
        "query": [1, 15381, 2],  # <|md_reserved_0|> query <|md_reserved_1|>, and the question
        "answer": [3, 3],  # doubled, as the release was trained
        "reasoning": [3, 4],
        "short caption": [1, 32708, 2, 12492, 3],  # describe, and how
        "normal caption": [1, 32708, 2, 6382, 3],
        "long caption": [1, 32708, 2, 4059, 3],
    }
    region = {
        "coord_features": 256,  # cosines and sines of a coordinate
        "size_features": 512,
        "hidden_size": 8192,
        "coord_bins": 1024,
        "size_bins": 2048,  # of width and height
    }
    TOKENIZER = "moondream/starmie-v1", "35192e10a54e36eabe0a7cc57a2c1aab371cafc5"  # repository and commit
    BESIDE = "starmie-v1"  # the folder of that repository's files beside the hub's weights, where there is no network
    END = "<|endoftext|>"

    def __init__(self, text_config=None, vision_config=None, tokens=None, region=None, **kwargs):
        self.tokens = type(self).tokens | (tokens or {})
        self.region = type(self).region | (region or {})
        super().__init__(text_config, vision_config, **kwargs)

    @property
    def barred_token(self):
        return self.tokens["answer"][0]

    def to_dict(self):
        return super().to_dict() | {"release": "2025-06-21"}

    def prompt_ids(self, questions, tokenizer):
        before, after = self.tokens["query"], self.tokens["answer"]
        return [[*before, *question, *after] for question in token_ids(questions, tokenizer)]

    def answer_ids(self, answers, tokenizer):
        return [[*answer, tokenizer.eos_token_id] for answer in token_ids(answers, tokenizer)]

    def load_tokenizer(self, model_id, revision=None):
        if self.release is None:  # what lies among the hub's weights is another one, left over
            beside = Path(model_id, self.BESIDE)
            model_id, revision = (beside, None) if beside.is_dir() else self.TOKENIZER
        try:
            cached_file(model_id, "tokenizer.json", revision=revision)
        except OSError as error:
            raise OSError(f"its tokenizer, {model_id}: {error}") from error
        ends = {"bos_token": self.END, "eos_token": self.END}
        return PreTrainedTokenizerFast.from_pretrained(model_id, revision=revision, trust_remote_code=False, **ends)


# ---------------------------------------------------------------------------------------------------------------------
# Release 2025-06-21: picture -> tensors
# ---------------------------------------------------------------------------------------------------------------------


class Pixels(NamedTuple):
    """What is seen of a picture, float32 in [-1, 1].

    whole: (3, 378, 378).
    local: (3, rows x 266 + 112, columns x 266 + 112), to be cut into tiles; of a picture that is one tile, `whole`.
    """

    whole: torch.Tensor
    local: torch.Tensor


def tiling(width, height, image_size=378, overlap=112, max_tiles=12):
    """The (rows, columns) of tiles that a picture of `width` x `height` pixels is cut into.

    A tile is `image_size` pixels wide, of which `overlap` are margins, a half at each side. One that is narrow in one
    direction is seen whole, however long it is.
    """
    window = image_size - overlap
    width, height = width - overlap, height - overlap
    if width <= window or height <= window:
        return 1, 1
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    if rows * columns > max_tiles:
        scale = math.sqrt(max_tiles / (rows * columns))
        return max(1, math.floor(rows * scale)), max(1, math.floor(columns * scale))
    rows = max(rows, math.floor(math.sqrt(max_tiles * height / width)))
    columns = max(columns, math.floor(math.sqrt(max_tiles * width / height)))
    if rows * columns > max_tiles and columns > rows:
        columns = max_tiles // rows
    elif rows * columns > max_tiles:
        rows = max_tiles // columns
    return max(1, rows), max(1, columns)


def preprocess_tiled(image, image_size=378, overlap=112, max_tiles=12):
    """A PIL image -> Pixels; see `tiling`."""
    image = upright_rgb(image)
    rows, columns = tiling(*image.size, image_size, overlap, max_tiles)
    whole = to_pixels(image, image_size, image_size, Image.Resampling.LANCZOS)
    if rows * columns == 1:
        return Pixels(whole, whole)
    width, height = (n * (image_size - overlap) + overlap for n in (columns, rows))
    return Pixels(whole, to_pixels(image, width, height, Image.Resampling.LANCZOS))


# ---------------------------------------------------------------------------------------------------------------------
# Release 2025-06-21: vision encoder, pictures -> (pictures, 729, 2048)
# ---------------------------------------------------------------------------------------------------------------------


class HfVisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.ln1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = VisionAttention(width, config.num_attention_heads)
        self.ln2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, width)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class HfVisionEncoder(nn.Module):
    """The whole picture and its tiles through one ViT; both views of a place, side by side, into the text's width."""

    crops_at_once = 16  # that go through the ViT: a long picture has many, and a card only so much memory

    def __init__(self, config):
        super().__init__()
        self.config = vision = config.vision_config
        width = vision.hidden_size
        self.patch_emb = PatchLinear(3 * vision.patch_size**2, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.image_tokens, width))
        self.blocks = nn.ModuleList(HfVisionBlock(vision) for _ in range(vision.num_hidden_layers))
        self.post_ln = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.proj_mlp = MLP(2 * width, vision.projection_size, config.text_config.hidden_size)
        self.overlap = 2 * vision.overlap_margin * vision.patch_size  # pixels

    def preprocess(self, image):
        return preprocess_tiled(image, self.config.image_size, self.overlap, self.config.max_tiles)

    def forward(self, images):
        """A PIL image, or a list of PIL images or Pixels -> (b, 729, 2048)."""
        images = [images] if isinstance(images, Image.Image) else images
        pixels = [x if isinstance(x, Pixels) else self.preprocess(x) for x in images]
        tilings, crops = [], [torch.stack([on_device_of(self.pos_emb, x.whole) for x in pixels])]
        for _, local in pixels:
            tiles, tiling = self._tiles(on_device_of(self.pos_emb, local))
            crops.append(tiles)
            tilings.append(tiling)
        features = torch.cat([self._vit(some) for some in torch.cat(crops).split(self.crops_at_once)])
        whole, *tiles = features.split([len(each) for each in crops])
        local = [self._stitch(*each) for each in zip(whole, tiles, tilings, strict=True)]
        return self.proj_mlp(torch.cat([whole, torch.stack(local)], dim=-1))

    def _vit(self, x):  # (b, 3, 378, 378) -> (b, 729, width)
        x = self.patch_emb(patches(x, self.config.patch_size)) + self.pos_emb
        for block in self.blocks:
            x = block(x)
        return self.post_ln(x)

    def _tiles(self, local):
        """(3, h, w) -> (tiles, 3, 378, 378) in raster order, and (rows, columns); none of one that is a tile itself."""
        size = self.config.image_size
        tiles = local.unfold(1, size, size - self.overlap).unfold(2, size, size - self.overlap)
        tiling = tiles.shape[1:3]
        tiles = rearrange(tiles, "c i j h w -> (i j) c h w")
        return (tiles if len(tiles) > 1 else tiles[:0]), tiling

    def _stitch(self, whole, tiles, tiling):
        """The tiles' features (tiles, 729, width), each place from the tile it is innermost in: (729, width)."""
        if not len(tiles):
            return whole
        side = self.config.image_size // self.config.patch_size
        margin = self.config.overlap_margin
        window = side - 2 * margin

        def places(n):
            """Of each row (column) of the map, which row (column) of tiles it is in, and where in that."""
            at = torch.arange(n * window + 2 * margin, device=tiles.device)
            tile = ((at - margin) // window).clamp(0, n - 1)
            return tile, at - window * tile

        (i, y), (j, x) = map(places, tiling)
        features = rearrange(tiles, "(i j) (y x) c -> i j y x c", i=tiling[0], y=side)
        stitched = features[i[:, None], j, y[:, None], x]
        pooled = F.adaptive_avg_pool2d(rearrange(stitched, "h w c -> c h w"), side)
        return rearrange(pooled, "c h w -> (h w) c")


# ---------------------------------------------------------------------------------------------------------------------
# Release 2025-06-21: text model
# ---------------------------------------------------------------------------------------------------------------------


class HfTextAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, mask, cache, positions=None):
        x = attention(self.qkv(x), cos, sin, mask, cache, self.layer, self.config)
        return self.proj(at(positions, x))


class HfTextBlock(nn.Module):
    """As a TextBlock."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = HfTextAttention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x, cos, sin, mask, cache, positions=None):
        h = self.ln(x)
        return at(positions, x) + self.attn(h, cos, sin, mask, cache, positions) + self.mlp(at(positions, h))


class WordEmbeddings(nn.Module):
    """A text model's `wte`, which the release has as a bare parameter, as the module that transformers asks for."""

    def __init__(self, text_model):
        super().__init__()
        self.text_model = (text_model,)  # in a tuple: it is no part of this module

    @property
    def weight(self):
        return self.text_model[0].wte

    def forward(self, ids):
        if not self.weight.is_meta:
            return F.embedding(ids, self.weight)
        from accelerate.utils import align_module_device  # which has offloaded it

        with align_module_device(self.text_model[0]):
            return F.embedding(ids, self.weight)


class HfTextModel(Phi):
    """The release's names for the parts of a Phi."""

    config_class = HfMoondreamTextConfig
    _no_split_modules = ["HfTextBlock"]
    adapter_targets = ("qkv", "proj", "fc1", "fc2")

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.wte = nn.Parameter(torch.randn(config.vocab_size, width))
        self.words = (WordEmbeddings(self),)
        self.blocks = nn.ModuleList(HfTextBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.post_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()

    @property
    def layers(self):
        return self.blocks

    @property
    def final_norm(self):
        return self.post_ln

    def get_input_embeddings(self):
        return self.words[0]

    def get_output_embeddings(self):
        return self.lm_head


class HfRegionModel(nn.Module):
    """The release's weights for pointing at regions, carried along unchanged: they take no part in answering."""

    def __init__(self, config):
        super().__init__()
        width, region = config.text_config.hidden_size, config.region
        coord, size, hidden = (region[name] for name in ("coord_features", "size_features", "hidden_size"))
        self.coord_features = nn.Parameter(torch.zeros(1, coord // 2))
        self.size_features = nn.Parameter(torch.zeros(2, size // 2))
        self.coord_encoder, self.size_encoder = nn.Linear(coord, width), nn.Linear(size, width)
        self.coord_decoder = MLP(width, hidden, region["coord_bins"])
        self.size_decoder = MLP(width, hidden, region["size_bins"])


# ---------------------------------------------------------------------------------------------------------------------
# Release 2025-06-21: Moondream
# ---------------------------------------------------------------------------------------------------------------------


class HfMoondream(Release):
    """Moondream2: `vision_encoder`, `text_model`, and a region model, which is only carried along."""

    config_class = HfMoondreamConfig
    text_name = "model.text"
    _no_split_modules = ["HfTextBlock", "HfVisionBlock"]

    def __init__(self, config):
        super().__init__(config)
        parts = {"vision": HfVisionEncoder(config), "text": HfTextModel(config.text_config)}
        self.model = nn.ModuleDict(parts | {"region": HfRegionModel(config)})
        self.post_init()

    @property
    def vision_encoder(self):
        return self.model.vision

    @property
    def text_model(self):
        return self.model.text

    def query(self, image, question, reasoning=False, tokenizer=None, max_new_tokens=None):
        """{"answer": its text, "probability": of the whole of it}, of a question about a picture, or none (None).

        With `reasoning` the model thinks aloud first: {"reasoning": {"text": what it says}} comes with it.
        """
        embeds, tokenizer = None if image is None else self.encode_image(image), tokenizer or self._tokenizer
        (prompt,), said = self.config.prompt_ids([question], tokenizer), {}
        if reasoning:
            prompt, text = self._reason(embeds, prompt, tokenizer, max_new_tokens)
            said = {"reasoning": {"text": text}}
        ((answer,),) = self._answer(embeds, [[prompt]], tokenizer, max_new_tokens)
        return {**said, "answer": answer.text, "probability": answer.probability}

    def _reason(self, image_embeds, prompt, tokenizer, max_new_tokens):
        """A prompt's ids with what the model thinks before it answers, and that as a text. It ends as a prompt does."""
        ask, think = self.config.tokens["answer"], self.config.tokens["reasoning"]
        prompt, end = [*prompt[: -len(ask)], *think], ask[0]
        (((ids, _),),) = self.generate_ids(image_embeds, [[prompt]], tokenizer.bos_token_id, end, max_new_tokens)
        ids = [token for token in ids if token != end]
        return [*prompt, *ids, end], tokenizer.decode(ids, skip_special_tokens=True).strip()

    def answer_question(
        self,
        image_embeds,
        question,
        tokenizer=None,
        chat_history="",
        result_queue=None,
        max_new_tokens=None,
        **kwargs,
    ):
        """The answer to a question about one encoded picture (1, 729, 2048); `result_queue` gets it as well."""
        if chat_history:
            raise ValueError("Moondream2 of 2025-06-21 takes no chat_history: a prompt of it holds one question")
        tokenizer = tokenizer or self._tokenizer
        prompts = self.config.prompt_ids([question], tokenizer)
        (answer,) = self._answer_each(image_embeds, prompts, tokenizer, max_new_tokens, kwargs)
        if result_queue is not None:
            result_queue.put(answer)
        return answer

    def batch_answer(self, images, prompts, tokenizer=None, max_new_tokens=None, **kwargs):
        """The answers to one question for each picture."""
        tokenizer = tokenizer or self._tokenizer
        prompts = self.config.prompt_ids(prompts, tokenizer)
        return self._answer_each(self.encode_image(images), prompts, tokenizer, max_new_tokens, kwargs)

    def caption(self, image, length="normal", tokenizer=None, max_new_tokens=512, **kwargs):
        """{"caption": a text} for a picture, "short", "normal" or "long"."""
        embeds, prompt = self.encode_image(image), self.config.tokens[f"{length} caption"]
        (text,) = self._answer_each(embeds, [prompt], tokenizer or self._tokenizer, max_new_tokens, kwargs)
        return {"caption": text}

    def detect(self, *args, **kwargs):
        raise NotImplementedError("this file answers questions: detect needs the code that the release came with")

    def point(self, *args, **kwargs):
        raise NotImplementedError("this file answers questions: point needs the code that the release came with")


AutoConfig.register(MoondreamConfig.model_type, MoondreamConfig, exist_ok=True)  # whose from_dict knows the other
for config_class, model_class in ((MoondreamConfig, Moondream), (HfMoondreamConfig, HfMoondream)):
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForCausalLM")
