"""Checks what is loaded: that it is Moondream2 of 2024-08-26, whole; and says in one line why it can't be had.

Nothing that is loaded brings code that runs: not for a model's configuration, network, tokenizer or attention, and not
in its weights.
"""

from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

from safetensors import SafetensorError
from transformers import PretrainedConfig

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
        refuse_another(model_id, PretrainedConfig.get_config_dict(model_id, revision=revision)[0])
        yield loaded
    except (OSError, SafetensorError) as error:
        folder = Path(model_id).parent
        if folder != Path() and folder.is_dir() and not Path(model_id).exists():  # no owner of the hub's, a folder here
            raise InputError(f"cannot load {model_id}: it is not there, though {folder} is") from None
        advice = (
            f" Where there is no network, fetch it elsewhere by `hf download {model_id} --revision {revision} "
            "--local-dir moondream2-weights`, copy it and give its path as --model_id; "
            "--model_id tests/tiny_moondream2 runs without the hub"
        )
        advice = "" if Path(model_id).is_dir() else advice
        raise InputError(f"cannot load {model_id}: {first_line(error)}{advice}") from None
    except UnpicklingError:  # which advises to run that code
        raise wrong_model(model_id, "its weights are a pickle of more than tensors, which may be code") from None
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        advised = "trust_remote_code" in str(error)
        found = "it brings code of its own, which is not run" if advised else first_line(error)
        raise wrong_model(model_id, found) from error
    config, tokenizer = loaded.config, loaded.tokenizer
    if config and config.architectures != ["Moondream"]:
        raise wrong_model(model_id, f"found {config.model_type}, {config.architectures}")
    if tokenizer and not tokenizer.eos_token_id == tokenizer.bos_token_id is not None:
        raise wrong_model(model_id, "its tokenizer does not begin and end texts with one token")
    if loaded.info and loaded.info["missing_keys"]:
        raise wrong_model(model_id, f"its weights lack {min(loaded.info['missing_keys'])}")


def choose_views(config, model_id, tiles):
    """Makes a model's configuration one without tiles where `tiles` is False; raises InputError where it can't be."""
    if tiles and not config.has_tiles:
        raise InputError(f"{model_id} was trained on pictures in one view: give --tiles false for it, too")
    if not tiles and not config.can_leave_out_tiles:
        raise InputError(f"{model_id} can't do without tiles: TILES = False is for the release 2024-08-26")
    if not tiles:
        config.leave_out_tiles()


def refuse_another(model_id, config):
    """Raises InputError where `config`, what config.json holds, is not Moondream2's, or names code to be fetched."""
    if Path(model_id, "adapter_config.json").is_file():
        raise wrong_model(model_id, "it holds an adapter, which this script can't train or ask")
    config = config if isinstance(config, dict) else {}
    kind = config.get("model_type") or "no model_type in a config.json"
    if kind != MoondreamConfig.model_type:
        own = ", with code of its own, which is not run" if "auto_map" in config else ""
        raise wrong_model(model_id, f"found {kind}{own}")
    if "quantization_config" in config:
        raise wrong_model(model_id, "its weights are quantized")
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]
    for name in ("attn_implementation", "_attn_implementation"):
        if any("/" in str(part.get(name)) for part in parts):  # a repository, whose code transformers would fetch
            raise wrong_model(model_id, "it names code for its attention, which is not fetched")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def wrong_model(model_id, found):
    return InputError(
        f"{model_id} is not Moondream2 of 2024-08-26 ({found}): give MODEL_ID and REVISION as the script came with them"
    )
