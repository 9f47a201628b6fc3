"""Loads Moondream2 of 2024-08-26 from the hub or a folder, and says in one line why where it can't be had."""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moondream2.cli import InputError
from moondream2.modeling_moondream2 import MoondreamConfig

HUB_ID, HUB_REVISION = "vikhyatk/moondream2", "92d3d73b6fd61ab84d9fe093a9c7fd8c04bf2c0d"


def load_tokenizer(model_id, revision):
    """The model's configuration and tokenizer, without its weights.

    Raises:
        InputError: they can't be had, or are another model's.
    """
    with explained(model_id):
        where = {"pretrained_model_name_or_path": model_id, "revision": revision_of(model_id, revision)}
        config = AutoConfig.from_pretrained(**where)
        if not isinstance(config, MoondreamConfig) or config.architectures != ["Moondream"]:
            raise wrong_model(model_id, f"found {config.model_type}, {config.architectures}")
        return config, AutoTokenizer.from_pretrained(**where)


def load_model(model_id, revision):
    """Moondream2 in bfloat16.

    Raises:
        InputError: it can't be had, or its weights are another model's.
    """
    with explained(model_id):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_id, revision=revision_of(model_id, revision), dtype=torch.bfloat16, output_loading_info=True
        )
    if loaded["missing_keys"]:
        raise wrong_model(model_id, f"its weights lack {min(loaded['missing_keys'])}")
    return model.eval()


def revision_of(model_id, revision):
    """A local folder has no revision."""
    return None if Path(model_id).is_dir() else revision


@contextmanager
def explained(model_id):
    """Says in one line why a model can't be had, or that it is another one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot load {model_id}: {first_line(error)} Where there is no network, fetch it elsewhere by "
            f"`hf download {HUB_ID} --revision {HUB_REVISION} --local-dir moondream2-weights`, copy it and give its "
            "path as --model_id; --model_id tests/tiny_moondream2 runs without the hub"
        ) from None
    except (ValueError, KeyError, RuntimeError) as error:
        raise wrong_model(model_id, first_line(error)) from error


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def wrong_model(model_id, found):
    return InputError(f"{model_id} is not Moondream2 of 2024-08-26 ({found}): use {HUB_ID} at REVISION {HUB_REVISION}")
