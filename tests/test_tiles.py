"""TILES = False: what a run learns, stores, scores and saves is of pictures in one view, and so is what is asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import ask, check, modeling_moondream2
from moondream2.cli import InputError
from moondream2.loading import choose_views
from moondream2.modeling_moondream2 import HfMoondreamConfig
from tests.shared import TINY, constants


@pytest.fixture
def flags(data):
    flags = {"model_id": TINY, "train_file": data / "train.jsonl", "valid_file": data / "valid.jsonl"}
    return {**flags, "output_dir": data / "out", "features_dir": data / "features", "epochs": 1, "batch_size": 4}


def in_one_view(path, side):
    """Pixels (3, side, side) in [-1, 1] of a whole picture."""
    pixels = np.asarray(Image.open(path).resize((side, side), Image.Resampling.BICUBIC))
    return torch.tensor(pixels).movedim(-1, 0) / 127.5 - 1


def test_a_run_without_tiles(flags, data, run_main):
    run_main(**flags, tiles="false")
    out, (store,) = flags["output_dir"], [path for path in flags["features_dir"].iterdir() if path.is_dir()]
    assert json.loads((out / "config.json").read_text())["vision_config"]["tile_from"] is None
    assert "Pictures are seen in one view, without tiles" in (out / "README.md").read_text()

    # What was stored, and by that trained and judged on, is the plain encoder's word on whole pictures.
    model, side = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16), 126
    stored = [load_file(path)["features"] for path in store.rglob("*.safetensors")]
    names, large = [f"{number}.png" for number in range(11)], ["0.png", "3.png", "6.png", "9.png"]
    assert {name for name in names if max(Image.open(data / name).size) >= 512} == {*large}
    features = {name: model.encode_image([in_one_view(data / name, side)])[0] for name in names}
    assert len(stored) == len(names)
    for each in features.values():
        assert min((each - other).abs().max() for other in stored) < 0.1
    for name in large:  # in tiles they are others
        tiled = model.encode_image(Image.open(data / name))[0]
        assert min((tiled - other).abs().max() for other in stored) > 0.1

    # The saved model, asked by this project or by its own code, sees the same without being told.
    saved, _ = ask.load(out)
    for name in large:
        torch.testing.assert_close(
            saved.vision_encoder.preprocess(Image.open(data / name)), in_one_view(data / name, side)
        )
    assert (out / "modeling_moondream2.py").read_bytes() == Path(modeling_moondream2.__file__).read_bytes()

    # A second round has to say that it goes on so.
    second = flags | {"model_id": out, "output_dir": data / "second", "tiles": "true"}
    with pytest.raises(
        InputError, match=f"^{out} was trained on pictures in one view: give --tiles false for it, too$"
    ):
        run_main(**second)
    with pytest.raises(InputError, match="in one view"):
        check.check(constants(**{name: str(value) for name, value in second.items() if name.endswith(("id", "dir"))}))
    config, _ = script.load_tokenizer(str(out), None)
    choose_views(config, out, tiles=False)
    assert not config.has_tiles


@pytest.mark.slow
def test_a_run_is_not_gone_on_from_with_other_views(flags, run_main, monkeypatch):
    save = script.save
    monkeypatch.setattr(script, "save", lambda *arguments: 1 / 0)  # the checkpoint stays
    with pytest.raises(ZeroDivisionError):
        run_main(**flags)
    monkeypatch.setattr(script, "save", save)
    with pytest.raises(InputError, match="is of a run with other settings .*TILES was True, is False"):
        run_main(**flags, tiles="false")
    run_main(**flags)


def test_a_model_that_can_not_do_without_tiles_is_refused(flags, run_main, monkeypatch):
    """Before a file is read."""
    monkeypatch.setattr(script, "read_data", lambda *arguments: pytest.fail("it went on"))
    monkeypatch.setattr("moondream2.modeling_moondream2.MoondreamConfig.can_leave_out_tiles", False)
    with pytest.raises(
        InputError, match=f"^{TINY} can't do without tiles: TILES = False is for the release 2024-08-26$"
    ):
        run_main(**flags, tiles="false")
    for config in (HfMoondreamConfig(), HfMoondreamConfig.from_dict(HfMoondreamConfig().to_dict())):
        choose_views(config, "a later release", tiles=True)
        with pytest.raises(InputError, match="a later release can't do without tiles"):
            choose_views(config, "a later release", tiles=False)
