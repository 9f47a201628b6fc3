"""Exports a saved model for llama.cpp and Ollama, into a folder `gguf` in it or into one that is named.

python -m moondream2.export_gguf moondream_crosswalks_finetuned
python -m moondream2.export_gguf moondream_crosswalks_finetuned --type q8_0 --output_dir crosswalks_q8

Their engine has no graph for Moondream2, but one for each of its halves: Phi-2's for the text model, and for the vision
encoder LLaVA's, which is told to do as Moondream does. docs/serving.md has the lines that serve the files, and what is
not the same there.
"""

import argparse
import json
import math
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from moondream2 import cli
from moondream2.cli import InputError
from moondream2.files import write_whole
from moondream2.loading import checked_loading
from moondream2.modeling_moondream2 import MAX_NEW_TOKENS
from moondream2.output_dir import exists

try:
    import gguf
except ImportError:  # training does without
    gguf = None

PACKAGE = "gguf==0.19.0"
CHAT_TEMPLATE = Path(__file__).with_name("gguf_chat.jinja")
TYPES = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # of the text model's matrices
FLOAT16_MAX = torch.finfo(torch.float16).max
GB = 1e9
# Ollama gets no TEMPLATE: with one it puts the picture behind the question.
MODELFILE = """\
FROM ./{0}
FROM ./{1}
PARAMETER temperature 0
PARAMETER num_predict {2}
"""
README = """\
# {0}, for llama.cpp and Ollama

A fine-tuned Moondream2 of 2024-08-26. To serve it with llama.cpp, in this folder:

    llama-server --jinja -m {1} --mmproj {2} -np 4 -c 8192 -n {3}

and with Ollama:

    ollama create {0} -f Modelfile

Ask about one picture at a time, at temperature 0. {4} Turn it upright and put it on white before, where its file has an
EXIF orientation or transparency: the engines do neither.
"""
VIEWS = {
    True: "A large picture is seen in one view here, and less sharply than in training, where it had tiles as well.",
    False: "It is seen in one view, as in training.",
}


# ---------------------------------------------------------------------------------------------------------------------
# The engine's names of weights: generators of (name, tensor), which read one at a time
# ---------------------------------------------------------------------------------------------------------------------


def pairs(target, source, read):
    """Weight and bias of a layer."""
    for part in ("weight", "bias"):
        yield f"{target}.{part}", read(f"{source}.{part}")


def text_tensors(config, read):
    """The text model's, of Phi-2's graph, which takes queries, keys and values in one matrix as they are."""
    yield "token_embd.weight", read("text_model.transformer.embd.wte.weight")
    for layer in range(config.text_config.num_hidden_layers):
        target, source = f"blk.{layer}", f"text_model.transformer.h.{layer}"
        yield from pairs(f"{target}.attn_norm", f"{source}.ln", read)
        yield from pairs(f"{target}.attn_qkv", f"{source}.mixer.Wqkv", read)
        yield from pairs(f"{target}.attn_output", f"{source}.mixer.out_proj", read)
        yield from pairs(f"{target}.ffn_up", f"{source}.mlp.fc1", read)
        yield from pairs(f"{target}.ffn_down", f"{source}.mlp.fc2", read)
    yield from pairs("output_norm", "text_model.lm_head.ln", read)
    yield from pairs("output", "text_model.lm_head.linear", read)


def vision_tensors(config, read):
    """The vision encoder's and the projection's, of LLaVA's graph, which takes queries, keys and values apart."""
    visual, projection = "vision_encoder.encoder.model.visual", "vision_encoder.projection.mlp"
    side = config.vision_config.patch_size
    yield "v.patch_embd.weight", read(f"{visual}.patch_embed.linear.weight").unflatten(1, (3, side, side))
    yield "v.patch_embd.bias", read(f"{visual}.patch_embed.linear.bias")
    yield "v.position_embd.weight", read(f"{visual}.pos_embed")[0]
    for layer in range(config.vision_config.num_hidden_layers):
        target, source = f"v.blk.{layer}", f"{visual}.blocks.{layer}"
        yield from pairs(f"{target}.ln1", f"{source}.norm1", read)
        for part in ("weight", "bias"):
            for name, each in zip("qkv", read(f"{source}.attn.qkv.{part}").chunk(3), strict=True):
                yield f"{target}.attn_{name}.{part}", each
        yield from pairs(f"{target}.attn_out", f"{source}.attn.proj", read)
        yield from pairs(f"{target}.ln2", f"{source}.norm2", read)
        yield from pairs(f"{target}.ffn_up", f"{source}.mlp.fc1", read)
        yield from pairs(f"{target}.ffn_down", f"{source}.mlp.fc2", read)
    yield from pairs("v.post_ln", f"{visual}.norm", read)
    # A picture in one view lies twice side by side, [x, x]: what each half makes of x, they make together.
    halves = read(f"{projection}.fc1.weight").unflatten(1, (2, -1))
    yield "mm.0.weight", halves.sum(1)
    yield "mm.0.bias", read(f"{projection}.fc1.bias")
    yield from pairs("mm.2", f"{projection}.fc2", read)


# ---------------------------------------------------------------------------------------------------------------------
# What the engine is told beside them
# ---------------------------------------------------------------------------------------------------------------------


def describe_text(writer, config, tokenizer):
    """The text model's sizes, its tokenizer, and how a conversation becomes a prompt."""
    text = config.text_config
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_attention_heads)
    writer.add_layer_norm_eps(text.layer_norm_eps)
    writer.add_rope_dimension_count(text.rotary_dim)
    writer.add_rope_freq_base(text.rotary_theta)
    writer.add_sampling_temp(0)

    kinds = gguf.TokenType
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [(f"[unused{number}]", kinds.UNUSED) for number in range(text.vocab_size)]
    for token, number in model["vocab"].items():
        tokens[number] = token, kinds.NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():  # runs of spaces and tabs, and the end of a text
        tokens[number] = token.content, kinds.CONTROL if token.special else kinds.USER_DEFINED
    names, types = zip(*tokens, strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("phi-2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE.read_text(encoding="utf-8"))


def describe_vision(writer, config):
    """The vision encoder's sizes, and what makes LLaVA's graph and preprocessing Moondream's."""
    vision = config.vision_config
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_use_gelu(True)
    # LLaVA's graph leaves the last block out unless it is named.
    writer.add_array("clip.vision.feature_layer", [vision.num_hidden_layers])
    # LLaVA's pictures keep their shape within a square, padded. Those that are to be seen in tiles as well, of the
    # sizes given here, are also seen whole, stretched as Moondream's are; of a size without height there are no tiles.
    writer.add_array("clip.vision.image_grid_pinpoints", [vision.image_size, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def outline(tensors, config, weights):
    """[(name, shape)] of what `tensors` yields; nothing is read."""
    shapes = tensors(config, lambda name: torch.empty(weights.get_slice(name).get_shape(), device="meta"))
    return [(name, tuple(tensor.shape)) for name, tensor in shapes]


@contextmanager
def opened(folder):
    """Gives a saved model's configuration, tokenizer, open weights, and how many tokens its answers have at most.

    Raises:
        InputError: it is no Moondream2 of 2024-08-26, or not whole.
    """
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder}: give that of a saved model, a run's OUTPUT_DIR")
    with checked_loading(folder, None) as loaded:
        config = loaded.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_two_way(folder, config)
        loaded.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        weights = safe_open(Path(folder, "model.safetensors"), "pt")
        for tensors in (text_tensors, vision_tensors):
            outline(tensors, config, weights)
        generation = Path(folder, "generation_config.json")
        said = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    with weights:
        yield config, loaded.tokenizer, weights, said.get("max_new_tokens") or MAX_NEW_TOKENS


def announce(writer, tensors, matrices, config, weights):
    """Tells `writer` the tensors' names, shapes and types: float32 for the few that are small, `matrices` for others.

    Returns:
        the bytes that they take.
    """
    total = 0
    for name, shape in outline(tensors, config, weights):
        is_small = len(shape) == 1 or name in ("v.patch_embd.weight", "v.position_embd.weight")
        kind = gguf.GGMLQuantizationType["F32" if is_small else matrices]
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        total += size
    return total


def write(writer, path, tensors, config, weights):
    """Writes what `writer` was told, then the tensors, each read, turned to its type and written before the next."""
    kinds = {name: tensor.dtype for name, tensor in writer.tensors[0].items()}
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    read = tensors(config, lambda name: weights.get_tensor(name).float())
    for name, tensor in tqdm(read, f"Writing {path.name}", len(kinds), unit=" tensors", leave=False):
        if kinds[name] == gguf.GGMLQuantizationType.F16 and not tensor.abs().max() <= FLOAT16_MAX:
            raise InputError(f"{name} holds what float16 can't: give --type bf16")
        values = gguf.quantize(tensor.contiguous().numpy(), kinds[name])
        try:
            writer.write_tensor_data(values)
        except OSError as error:  # numpy's, which counts what was written and leaves out why not all was
            raise OSError(f"the disk is full, or takes no more ({error})") from None
    writer.close()


def refuse_two_way(folder, config):
    if config.text_config.two_way_prefix:
        raise InputError(
            f"{folder} can't be exported: llama.cpp has no path for a prefix whose positions see each other both ways. "
            "Serve it with Moondream's own engine: docs/serving.md"
        )


def refuse_taken(folder):
    if exists(folder):
        raise InputError(f"{folder} is there already: remove it, or give another --output_dir")


def refuse_full(folder, size):
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"the export takes {size / GB:,.3f} GB in {folder}, where {free / GB:,.1f} are free")


def export(folder, target, kind):
    """Writes the folder `target`, whole or not at all, and returns the lines that serve it."""
    if gguf is None:
        raise InputError(f"the export needs a library that training does without: pip install {PACKAGE}")
    refuse_taken(target)
    with opened(folder) as (config, tokenizer, weights, most_new_tokens):
        text, vision = gguf.GGUFWriter(None, "phi2"), gguf.GGUFWriter(None, "clip")
        describe_text(text, config, tokenizer)
        describe_vision(vision, config)
        size = announce(text, text_tensors, TYPES[kind], config, weights)
        size += announce(vision, vision_tensors, "F16", config, weights)
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_full(target.parent, size)
        names = f"text-model-{kind}.gguf", "mmproj-f16.gguf"
        name = re.sub(r"[^\w.-]+", "-", Path(folder).resolve().name)  # which Ollama takes, too
        page = README.format(name, *names, most_new_tokens, VIEWS[config.has_tiles])
        with write_whole(target) as beside:
            beside.mkdir()
            write(text, beside / names[0], text_tensors, config, weights)
            write(vision, beside / names[1], vision_tensors, config, weights)
            (beside / "Modelfile").write_text(MODELFILE.format(*names, most_new_tokens), encoding="utf-8", newline="\n")
            (beside / "README.md").write_text(page, encoding="utf-8", newline="\n")
            refuse_taken(target)  # it takes minutes
    print(f"Saved to {target}, {size / GB:,.3f} GB. Its README.md says how to serve it.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="the folder of a saved model")
    parser.add_argument("--output_dir", help="a folder that is to be made; default: gguf, in the model's")
    parser.add_argument("--type", default="f16", choices=TYPES, help="of the text model's matrices; default: f16")
    words = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    export(words.model, Path(words.output_dir or Path(words.model, "gguf")), words.type)


if __name__ == "__main__":
    cli.run(main)
