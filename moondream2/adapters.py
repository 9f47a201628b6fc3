"""Adapters of peft in place of every weight of the text model: what a run with LORA_RANK trains, and how it is saved.

LoRA (https://arxiv.org/abs/2106.09685): a layer's weight W stays as it is, and W + 2 B A takes its place, where A and B
have few rows and few columns. Only A and B are trained, in float32, and have gradients and moments. docs/small-cards.md
has what that costs and gains.
"""

import importlib.util
import sys
from functools import cache

import torch
from safetensors.torch import save_file

from moondream2.cli import InputError

PACKAGE = "peft==0.21.2"
NAME = "default"  # peft's, of the only adapter that a layer has here
ALPHA = 2  # times the rank: peft divides alpha by the rank, so that any rank adds 2 B A
FULL_RATE = 3e-5  # LEARNING_RATE as the script comes, made for a run that moves every weight
TOLERANCE = 1e-3  # of the loss: what rounding the merged weights may change it by, unsaid


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
        print(f"warning: {rate}; adapters, which begin at 0, learn little at it: try 3e-4 or 1e-3", file=sys.stderr)


def add_adapters(model, rank, model_id, revision, seed):
    """Puts adapters on the text model's layers, which say nothing yet, and freezes all other weights.

    Args:
        model_id, revision: of the model, for those who are given the adapter alone.
        seed: of the adapters' first weights, so that every process has the same.
    Returns:
        the model.
    Raises:
        InputError: the rank is above the width of the layers.
    """
    from peft import inject_adapter_in_model

    narrowest = min(min(layer.weight.shape) for _, layer in layers_of(model))
    if rank > narrowest:
        raise InputError(f"LORA_RANK {rank} is above {narrowest}, the width of the layers that it is to be less than")
    config = lora_config(model, rank, model_id, revision)
    config._register_custom_module({torch.nn.Linear: low_rank_linear()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.float()
    return model


def lora_config(model, rank, model_id, revision):
    """peft's configuration of the adapters: a pattern tells the text model's layers from the encoder's of that name."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=ALPHA * rank,
        target_modules=rf"{path_of(model)}\..*\.({'|'.join(model.text_model.adapter_targets)})",
        base_model_name_or_path=str(model_id),
        revision=revision,
    )


def path_of(model):
    """The text model's name within the model."""
    return next(name for name, module in model.named_modules() if module is model.text_model)


def layers_of(model):
    """(name, layer) of each of the text model's layers that adapters sit on."""
    names = model.text_model.adapter_targets
    return [each for each in model.text_model.named_modules() if each[0].rpartition(".")[2] in names]


@cache
def low_rank_linear():
    """The class of a layer with its adapter, which is peft's but for the way that it computes: in the layer's own type.

    peft casts what the layer is given to the adapter's float32, and keeps that for the backward pass: at full size
    several times what all else keeps. Here the small matrices are cast instead.
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
def merge(model):
    """Adds the adapters to the weights that they sit on, in float32, rounded once; then takes them off the model."""
    text_model = model.text_model
    for name, layer in layers_of(model):
        base, (a, b) = layer.base_layer, (each[NAME].weight for each in (layer.lora_A, layer.lora_B))
        base.weight.copy_(base.weight.float() + layer.scaling[NAME] * (b @ a))
        text_model.set_submodule(name, base)
    del model.peft_config


def save_adapter(folder, model, weights, rank, model_id, revision):
    """Fills a folder with the adapters alone in peft's format, for `PeftModel.from_pretrained` on the model as it came.

    Args:
        weights: {name in the text model: tensor}, as a checkpoint has them.
    """
    config = lora_config(model, rank, model_id, revision)
    config.inference_mode = True
    config.save_pretrained(folder)
    prefix = f"base_model.model.{path_of(model)}"
    named = {f"{prefix}.{name.replace(f'.{NAME}.', '.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
