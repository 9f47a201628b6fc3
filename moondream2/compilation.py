"""COMPILE: torch.compile makes kernels of a layer of the text model, the same for all of its layers."""

import logging
import sys
import time
from itertools import product

import torch

from moondream2.modeling_moondream2 import attention_mask_4d, rotary_angles, row_mask

PREFIX, LENGTHS = 32, (64, 128)  # positions of the rows of a trial
ROWS = (1, 2)  # a compiler takes one row for a kind of its own
QUESTIONS = (1, 2)  # in each: rows of one question have no mask


def compile_layers(text_model, is_sharded=False, backend="inductor"):
    """Compiles the layers in place, for rows of any number and length; where that fails, they stay as they are.

    The first is left out, as what it is given needs no gradient where adapters are trained, and the last, where
    positions leave on the way: each would be a kind of its own. A trial on made-up rows compiles all that training will
    meet, and says what that took; or in one line why it failed. What FSDP shards stays as it is: that was never tried.
    """
    if is_sharded:
        print("COMPILE is left out: with FSDP it was never tried", flush=True)
        return
    _, *layers, _ = text_model.layers
    started = time.monotonic()
    logging.disable(logging.WARNING)  # of torch, which would show all that a compiler said
    try:
        for layer in layers:
            layer.compile(backend=backend, dynamic=True)
        for kind in product(ROWS, QUESTIONS, LENGTHS):
            try_out(text_model, layers[0], *kind)
    except Exception as error:  # torch's, Triton's or the compiler's own
        for layer in layers:
            layer._compiled_call_impl = None
        reason = " ".join(str(error).splitlines()[:2])
        print(f"COMPILE is in vain, layers run uncompiled: torch.compile failed: {reason}", file=sys.stderr)
    else:
        print(f"COMPILE: the layers are compiled, in {time.monotonic() - started:.0f} s", flush=True)
    finally:
        logging.disable(logging.NOTSET)
    text_model.zero_grad()


def try_out(text_model, layer, rows, questions, tokens):
    """A forward and a backward pass of a layer, over rows of `tokens` positions with that many questions."""
    weight, config = next(layer.parameters()), text_model.config
    x = torch.zeros(rows, tokens, config.hidden_size, device=weight.device, dtype=weight.dtype, requires_grad=True)
    document_ids = torch.zeros(rows, tokens, dtype=torch.long, device=weight.device)
    document_ids[:, PREFIX:] = torch.arange(tokens - PREFIX, device=weight.device) * questions // (tokens - PREFIX) + 1
    mask = row_mask(document_ids, PREFIX) if questions > 1 else None
    mask = attention_mask_4d(mask, tokens, 0, PREFIX if config.two_way_prefix else 0, x)
    places = torch.arange(tokens, device=weight.device).expand(rows, -1)
    layer(x, *rotary_angles(places, config.rotary_dim, config.rotary_theta), mask, None, None).sum().backward()
