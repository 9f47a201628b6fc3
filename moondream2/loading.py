"""Checks what is loaded: that it is Moondream2 of 2024-08-26, whole; and says in one line why it can't be had."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError

from moondream2.cli import InputError
from moondream2.modeling_moondream2 import MoondreamConfig


@contextmanager
def checked_loading(model_id, revision):
    """Within it a model, or parts of it, are loaded.

    Gives a namespace to put into what was loaded and is to be checked: `config`, `tokenizer`, and `info`, that
    `from_pretrained(output_loading_info=True)` gives beside a model.

    Raises:
        InputError: it can't be had, or is another model, or a part of it is missing.
    """
    loaded = SimpleNamespace(config=None, tokenizer=None, info=None)
    try:
        yield loaded
    except (OSError, SafetensorError) as error:
        advice = (
            f" Where there is no network, fetch it elsewhere by `hf download {model_id} --revision {revision} "
            "--local-dir moondream2-weights`, copy it and give its path as --model_id; "
            "--model_id tests/tiny_moondream2 runs without the hub"
        )
        advice = "" if Path(model_id).is_dir() else advice
        raise InputError(f"cannot load {model_id}: {first_line(error)}{advice}") from None
    except (ValueError, KeyError, RuntimeError) as error:
        raise wrong_model(model_id, first_line(error)) from error
    config, tokenizer = loaded.config, loaded.tokenizer
    if config and (not isinstance(config, MoondreamConfig) or config.architectures != ["Moondream"]):
        raise wrong_model(model_id, f"found {config.model_type}, {config.architectures}")
    if tokenizer and not tokenizer.eos_token_id == tokenizer.bos_token_id is not None:
        raise wrong_model(model_id, "its tokenizer does not begin and end texts with one token")
    if loaded.info and loaded.info["missing_keys"]:
        raise wrong_model(model_id, f"its weights lack {min(loaded.info['missing_keys'])}")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def wrong_model(model_id, found):
    return InputError(
        f"{model_id} is not Moondream2 of 2024-08-26 ({found}): give MODEL_ID and REVISION as the script came with them"
    )
