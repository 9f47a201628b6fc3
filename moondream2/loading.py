"""Checks what is loaded: that it is a Moondream2 of a known release, whole; and says in one line why it can't be had.

Nothing that is loaded brings code that runs: not for a model's configuration, network, tokenizer or attention, and not
in its weights.
"""

import hashlib
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import NamedTuple

from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils import cached_file

from moondream2.cli import InputError
from moondream2.modeling_moondream2 import HfMoondreamConfig, ReleaseConfig
from moondream2.pictures import nearest

REPOSITORY = "vikhyatk/moondream2"


class Known(NamedTuple):
    """A release: its date, its commit in REPOSITORY, and the SHA-256 of files that tell it from releases like it."""

    date: str
    commit: str
    files: dict[str, str]  # none where there is no other with its classes


RELEASES = {  # by what config.json has as `architectures`
    "Moondream": Known("2024-08-26", "92d3d73b6fd61ab84d9fe093a9c7fd8c04bf2c0d", {}),
    "HfMoondream": Known(
        "2025-06-21",
        "9a7d4024050840e001defacec2b00727e89149e6",
        {
            "config.json": "c4d59ae1179c1792ad49b8aeb59092101cc948d7b1914ed549689aed2c1fa083",
            "model.safetensors": "70a7d94c0c8349eb58ed2d9e636ef2d0916960f321ecabeac6354b8ba3d7403f",
        },
    ),
}


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
        refuse_another(model_id, revision, PretrainedConfig.get_config_dict(model_id, revision=revision)[0])
        yield loaded
    except (OSError, SafetensorError) as error:
        folder = Path(model_id).parent
        if folder != Path() and folder.is_dir() and not Path(model_id).exists():  # no owner of the hub's, a folder here
            near = nearest(folder, Path(model_id).name)
            advice = f"; nearest is {folder / near}" if near else ""
            raise InputError(f"cannot load {model_id}: it is not there, though {folder} is{advice}") from None
        # A folder has all but, as it comes from the hub, the tokenizer of a release that has it elsewhere.
        is_there = Path(model_id).is_dir() and HfMoondreamConfig.TOKENIZER[0] not in str(error)
        advice = "" if is_there else how_to_fetch(model_id, revision)
        raise InputError(f"cannot load {model_id}: {first_line(error)}{advice}") from None
    except UnpicklingError:  # which advises to run that code
        raise wrong_model(model_id, "its weights are a pickle of more than tensors, which may be code") from None
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        advised = "trust_remote_code" in str(error)
        found = "it brings code of its own, which is not run" if advised else first_line(error)
        raise wrong_model(model_id, found) from error
    tokenizer = loaded.tokenizer
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


def refuse_another(model_id, revision, config):
    """Raises InputError where `config`, what config.json holds, is not Moondream2's, or names code to be fetched."""
    if Path(model_id, "adapter_config.json").is_file():
        raise wrong_model(model_id, "it holds an adapter, which this script can't train or ask")
    if Path(model_id).is_dir() and not Path(model_id, "config.json").is_file():
        raise InputError(f"{model_id} holds no model, as no config.json: a run saves its own there when it ends")
    config = config if isinstance(config, dict) else {}
    kind = config.get("model_type") or "no model_type in a config.json"
    if kind != ReleaseConfig.model_type:
        own = ", with code of its own, which is not run" if "auto_map" in config else ""
        raise wrong_model(model_id, f"found {kind}{own}")
    refuse_unknown_release(model_id, config, Path(cached_file(model_id, "config.json", revision=revision)).parent)
    if "quantization_config" in config:
        raise wrong_model(model_id, "its weights are quantized")
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]
    for name in ("attn_implementation", "_attn_implementation"):
        if any("/" in str(part.get(name)) for part in parts):  # a repository, whose code transformers would fetch
            raise wrong_model(model_id, "it names code for its attention, which is not fetched")


def refuse_unknown_release(model_id, config, folder):
    """Raises InputError where a Moondream2 is of no release in RELEASES, or its files in `folder` don't tell that."""
    architectures = config.get("architectures")
    known = RELEASES.get(architectures[0]) if isinstance(architectures, list) and len(architectures) == 1 else None
    if known is None:
        raise wrong_model(model_id, f"found {config['model_type']}, {architectures}")
    is_told = (
        not known.files
        or config.get("release") == known.date  # saved by this project
        or known.commit in (commit_of_cache(folder), commit_of_download(folder))
        or any(sha256(folder / name) == digest for name, digest in known.files.items())
    )
    if not is_told:
        raise wrong_model(model_id, f"found {architectures[0]}, of another commit than that of {known.date}")


def commit_of_cache(folder):
    """The commit whose files lie in a folder of the hub's cache; None of other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def commit_of_download(folder):
    """The commit that `hf download --local-dir` has noted of a folder's config.json; None where it has not."""
    with suppress(OSError, UnicodeDecodeError):
        noted = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
        return noted.read_text(encoding="utf-8").partition("\n")[0].strip()
    return None


def sha256(file):
    """The digest of a file; None where there is none."""
    with suppress(OSError), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
    return None


def how_to_fetch(model_id, revision):
    """What to do where there is no network, as the end of a line that says what is missing."""
    fetch = f"`hf download {model_id} --revision {revision} --local-dir moondream2-weights`"
    if Path(model_id).is_dir() or revision == RELEASES["HfMoondream"].commit:
        tokenizer, commit = HfMoondreamConfig.TOKENIZER
        folder = "moondream2-weights" if revision else model_id
        beside = f"`hf download {tokenizer} --revision {commit} --local-dir {folder}/{HfMoondreamConfig.BESIDE}`"
        fetch = beside if Path(model_id).is_dir() else f"{fetch} and {beside}"
    return (
        f" Where there is no network, fetch it elsewhere by {fetch}, copy it and give its path as --model_id; "
        "--model_id tests/tiny_moondream2 runs without the hub"
    )


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def wrong_model(model_id, found):
    dates, commits = " or ".join(each.date for each in RELEASES.values()), [each.commit for each in RELEASES.values()]
    return InputError(
        f"{model_id} is not Moondream2 of {dates} ({found}): "
        f"give {REPOSITORY} as MODEL_ID, and {' or '.join(commits)} as REVISION"
    )
