"""Adapters of peft in place of every weight of the text model: what a run with LORA_RANK trains, and how it is saved.

LoRA (https://arxiv.org/abs/2106.09685): a layer's weight W stays as it is, and W + 2 B A takes its place, where B has
few columns and A few rows, LORA_RANK of them. Only A and B are trained, in float32, and have gradients and moments.
docs/small-cards.md has what that costs and gains.
"""

import importlib.util
import re
import sys
from functools import cache

import torch
from safetensors.torch import save_file

from moondream2.cli import InputError
from moondream2.launch import whole_state

PACKAGE = "peft==0.21.2"
FOLDER = "adapter"  # in OUTPUT_DIR, beside the model that they are merged into
NAME = "default"  # peft's, of the only adapter that a layer has here
ALPHA = 2  # times the rank: peft divides alpha by the rank, so that any rank adds 2 B A
FULL_RATE = 3e-5  # LEARNING_RATE as the script comes, made for a run that moves every weight


def refuse_or_warn(lora_rank, learning_rate):
    """Warns of a LEARNING_RATE that is made for a run without adapters.

    Raises:
        InputError: peft is not installed.
    """
    if lora_rank is None:
        return
    if not importlib.util.find_spec("peft"):
        raise InputError(f"LORA_RANK needs the package of its adapters: pip install {PACKAGE}")
    if learning_rate <= FULL_RATE:
        rate = f"LEARNING_RATE {learning_rate:g} is one for every weight"
        print(f"warning: {rate}; adapters, which begin at 0, learn little at it: try 3e-4", file=sys.stderr)


def add(model, constants):
    """Puts adapters of LORA_RANK, if there is one, on the text model's layers, and freezes all other weights.

    B begins at 0, so that they say nothing yet. A is drawn by SEED: each process has the same.

    Returns:
        the model.
    Raises:
        InputError: the rank is above the width of the layers.
    """
    if constants.lora_rank is None:
        return model
    from peft import inject_adapter_in_model

    width = min(min(layer.weight.shape) for _, layer in layers_of(model))
    if constants.lora_rank > width:
        raise InputError(f"LORA_RANK {constants.lora_rank} is above {width}, the width of the layers")
    config = config_of(model, constants)
    config._register_custom_module({torch.nn.Linear: low_rank_linear()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(constants.seed)
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.float()  # peft gave it the type of its layer
    return model


def config_of(model, constants):
    """peft's configuration; by a pattern, as the encoder has layers of the same names."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=constants.lora_rank,
        lora_alpha=ALPHA * constants.lora_rank,
        target_modules=rf"{re.escape(model.text_name)}\..*\.({'|'.join(model.text_model.adapter_targets)})",
        base_model_name_or_path=str(constants.model_id),
        revision=constants.revision,
    )


def layers_of(model):
    """A list of (name, layer): the text model's layers that adapters sit on, with or without them."""
    names = model.text_model.adapter_targets
    return [each for each in model.text_model.named_modules() if each[0].rpartition(".")[2] in names]


@cache
def low_rank_linear():
    """The class of a layer with its adapter, which is peft's but for the way that it computes: in the layer's own type.

    peft casts what a layer is given to the adapter's float32 and keeps that for the backward pass, beside what the
    model keeps. Here the small matrices are cast instead. Their gradients are float32 again, where they add up.
    """
    from peft.tuners.lora import Linear

    class LowRankLinear(Linear):
        def forward(self, x):
            out = self.base_layer(x)  # (..., width)
            a, b = (each[NAME].weight.to(x.dtype).T for each in (self.lora_A, self.lora_B))
            low = x.flatten(0, -2) @ a  # (positions, rank)
            return torch.addmm(out.flatten(0, -2), low, b, alpha=self.scaling[NAME]).view_as(out)

    return LowRankLinear


@torch.no_grad()
def merge(model, accelerator, text_model):
    """Adds the adapters to the weights that they sit on, in float32, rounded once; then takes them off the model.

    Args:
        text_model: the model's, as `accelerator.prepare` gave it.
    Returns:
        {name: tensor}, the weights of the text model; of a sharded one only in the main process.
    """
    for name, layer in layers_of(model):
        base, (a, b) = layer.base_layer, (each[NAME].weight for each in (layer.lora_A, layer.lora_B))
        base.weight.copy_(base.weight.float() + layer.scaling[NAME] * (b @ a))
        model.text_model.set_submodule(name, base)
    del model.peft_config
    return whole_state(accelerator, text_model)


def save(folder, model, weights, constants):
    """Fills a folder with the adapters alone in peft's format, for `PeftModel.from_pretrained` on the model as it came.

    Args:
        weights: {name in the text model: tensor}, as a checkpoint has them.
    """
    config = config_of(model, constants)
    config.inference_mode = True
    config.save_pretrained(folder)
    path = f"base_model.model.{model.text_name}"
    named = {f"{path}.{name.replace(f'.{NAME}.', '.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
