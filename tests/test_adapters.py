"""LORA_RANK: adapters are trained in place of every weight, and saved merged and apart."""

import importlib.util
import json
import math
import signal
from itertools import count
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import finetune_moondream as script
from moondream2 import adapters, launch, log, machine
from moondream2.adapters import ALPHA, config_of, layers_of, refuse_or_warn
from moondream2.cli import InputError
from moondream2.evaluation import LEAST_NEW_TOKENS
from moondream2.features import image_embeds
from moondream2.optimizer import Step
from moondream2.pictures import pixels_of
from moondream2.rows import rows_of, text_inputs
from tests.shared import TINY, both_releases, constants, dataset, engine_of, layer_out, step_of, untimed
from tests.test_training import plain_losses

RANK = 4
PARAMETERS = RANK * 3 * 16 * 64  # of four layers in three blocks, in all 16 times as wide as the model


pytestmark = pytest.mark.smallest


@pytest.fixture
def flags(data, small_model):
    return {
        "model_id": small_model,
        "train_file": data / "train.jsonl",
        "valid_file": data / "valid.jsonl",
        "features_dir": data / "features",
        "output_dir": data / "out",
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "lora_rank": RANK,
    }


@pytest.fixture
def train(data, tokenizer):
    return dataset(data / "train.jsonl", tokenizer)


def adapted(model):
    """The model with adapters that say something."""
    adapters.add(model, constants(lora_rank=RANK))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def log_of(folder):
    records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [untimed(record) for record in records]


def collated(model, tokenizer, train):
    return script.collate(rows_of(train.examples, 10_000), layer_out(model, tokenizer, train))


# ---------------------------------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------------------------------


class Explicit(torch.nn.Module):
    """W + 2 B A, written out."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(x.detach().clone()) for x in (a, b))

    def forward(self, weight):
        return weight + 2 * self.b @ self.a


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_step_is_that_of_the_weights_written_out(tiny, small_model, tokenizer, train, is_checkpointed):
    """Loss, gradients and one step of AdamW against a plain loop over examples, whose weights are W + 2 B A."""
    plain = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval().requires_grad_(False)
    adapted(tiny)
    if is_checkpointed:
        tiny.activation_checkpointing_enable()
    low = {}
    for (name, layer), (_, other) in zip(layers_of(tiny), layers_of(plain), strict=True):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        low[name] = Explicit(a, b)
        parametrize.register_parametrization(other, "weight", low[name])
    examples = train.examples
    losses = plain_losses(plain, tokenizer, examples, train.pictures)
    loss = sum(losses) / sum(len(example.answer_ids) for example in examples)
    loss.backward()
    explicit = [p for each in low.values() for p in each.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(explicit, 0.05)
    torch.optim.AdamW(explicit, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0).step()

    engine = engine_of(tiny, learning_rate=1e-2, weight_decay=0.0)
    tiny.train()
    step = step_of(engine, [collated(tiny, tokenizer, train)], tiny.vision_encoder, 0.05)
    assert step.is_applied and step.loss == pytest.approx(loss.item(), rel=1e-5)
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    moved = 0.0
    for name, layer in layers_of(tiny):
        for got, expected in ((layer.lora_A, low[name].a), (layer.lora_B, low[name].b)):
            got = got["default"].weight
            assert (got - expected).norm() < 1e-3 * 1e-2 * expected.numel() ** 0.5, name  # a step is 1e-2 an element
            moved += expected.numel()
    assert moved == PARAMETERS


def test_adapters_alone_are_trained_and_only_in_the_text_model(flags, run_main, capsys, monkeypatch):
    seen, update = [], script.update

    def noting(engine, *more):
        held = [p for group in engine.optimizer.param_groups for p in group["params"]]
        states = engine.optimizer.state
        sent = update(engine, *more)
        seen.append((sum(p.numel() for p in held), {p.dtype for p in held}))
        seen.append({each.dtype for p in held for each in states[p].values()})
        return sent

    monkeypatch.setattr(script, "update", noting)
    run_main(**flags, valid_answers=0)
    assert seen[:2] == [(PARAMETERS, {torch.float32}), {torch.float32}]
    out = capsys.readouterr().out
    total = AutoModelForCausalLM.from_pretrained(flags["model_id"]).num_parameters() + PARAMETERS
    assert f"Trainable parameters: {PARAMETERS:,} of {total:,}\n" in out
    assert f"The optimizer holds {PARAMETERS:,}, " in out
    before, after = (load_file(flags[folder] / "model.safetensors") for folder in ("model_id", "output_dir"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    names = [f"{name}.weight" for name in ("mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2")]
    assert moved == {f"text_model.transformer.h.{layer}.{name}" for layer in range(3) for name in names}


@pytest.mark.parametrize("path", ["text_model", "model.text"])
def test_the_models_own_names_say_where_adapters_sit(path):
    """Whatever a release calls its text model and its layers; the vision encoder's of the same name have none."""

    class Text(torch.nn.Module):
        adapter_targets = ("proj",)

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)}) for _ in range(2))

    model = torch.nn.Module()
    model.vision = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})
    holder = model
    for part in path.split(".")[:-1]:
        holder.add_module(part, torch.nn.Module())
        holder = getattr(holder, part)
    holder.add_module(path.split(".")[-1], Text())
    text_model = holder.get_submodule(path.split(".")[-1])
    object.__setattr__(model, "text_model", text_model)
    model.text_name = path
    adapters.add(model, constants(lora_rank=2))
    assert {name.split(".lora")[0] for name in trained(model)} == {f"{path}.blocks.{k}.proj" for k in range(2)}


def kept_bytes(model, tokenizer, train):
    """What a forward pass keeps for the backward pass, besides weights, and of these what is as long as the rows."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = collated(model, tokenizer, train)
    embeds = image_embeds(batch["pictures"], model.vision_encoder, "cpu")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        script.answer_loss(model.text_model, batch, embeds, "cpu").backward()
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights)


def test_adapters_keep_no_more_for_the_backward_pass_than_every_weight_does(tokenizer, train):
    """peft's own layers keep what they are given once more, in float32."""
    kept = {}
    for way in ("all", "ours", "theirs"):
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
        if way == "ours":
            adapters.add(model, constants(lora_rank=RANK))
        elif way == "theirs":
            peft.get_peft_model(model, config_of(model, constants(lora_rank=RANK)))  # casts adapters to float32
        kept[way] = kept_bytes(model, tokenizer, train)
    assert kept["ours"] < 1.02 * kept["all"]
    assert kept["theirs"] > 1.2 * kept["ours"]


# ---------------------------------------------------------------------------------------------------------------------
# What is saved
# ---------------------------------------------------------------------------------------------------------------------


def answers_of(model, tokenizer, data):
    prepare = model.vision_encoder.preprocess
    embeds = {key: model.encode_image([pixels_of(picture, prepare)]) for key, picture in data.pictures.items()}
    most = {"max_new_tokens": LEAST_NEW_TOKENS}
    return {each.source: model.answer_question(embeds[each.picture], each.question, tokenizer, **most) for each in data}


def loss_of(model, tokenizer, data):
    batch = collated(model, tokenizer, data)
    with torch.no_grad():
        out = model.text_model(
            **text_inputs(batch, "cpu"), image_embeds=image_embeds(batch["pictures"], model.vision_encoder, "cpu")
        )
    return torch.nn.functional.cross_entropy(out.logits.float(), batch["targets"]).item()


@pytest.fixture
def in_float32(monkeypatch):
    load = script.load_model
    monkeypatch.setattr(script, "load_model", lambda *release: load(*release).float())


@both_releases
def test_the_merged_model_and_the_adapter_on_the_release_say_what_the_run_said(
    flags, run_main, in_float32, test_file, small_model, tokenizer, capsys, monkeypatch
):
    """In float32, where they are equal but for the order of sums: losses, answers. The best epoch is not the last."""
    finish_epoch = script.finish_epoch

    def last_is_worse(progress, loss, *more):
        return finish_epoch(progress, loss + 9 * (progress.epoch == flags["epochs"]), *more)

    monkeypatch.setattr(script, "finish_epoch", last_is_worse)
    flags["test_file"] = test_file
    run_main(**flags)
    folder, valid = flags["output_dir"], dataset(flags["valid_file"], tokenizer)
    best = min(log_of(folder)[1:], key=lambda record: record["valid_loss"])
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    release = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16).float()  # as the run has it
    apart = peft.PeftModel.from_pretrained(release, folder / "adapter").eval()
    for model in (merged, apart):
        assert loss_of(model, tokenizer, valid) == pytest.approx(best["valid_loss"], rel=1e-5)
        assert best["valid_loss"] < 0.9 * log_of(folder)[0]["valid_loss"]
        for name, data in (("predictions", valid), ("test_predictions", dataset(test_file, tokenizer))):
            lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
            assert answers_of(model, tokenizer, data) == {line["source"]: line["after"] for line in lines}
    text = f"{best['valid_loss']:.4f}"
    out, err = capsys.readouterr()
    assert f"Adapters merged into the weights: Validation Avg Loss {text}, {text} apart\n" in out
    assert "the merged weights" not in err
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (RANK, ALPHA * RANK, True)
    assert config["base_model_name_or_path"] == str(small_model) and config["revision"] == script.REVISION


def test_what_bfloat16_rounds_away_is_warned_of(capsys):
    progress = SimpleNamespace(history=[{}, {"valid_loss": 2.0}], best_epoch=1)
    for loss, warnings in ((2.0 + 1.9 * log.TOLERANCE, 0), (2.0 + 2.1 * log.TOLERANCE, 1), (1.9, 1), (math.nan, 1)):
        log.merged(loss, progress)
        assert (
            capsys.readouterr().err.count("warning: the merged weights, rounded, have a validation loss of") == warnings
        )


def test_weights_are_merged_in_float32_and_rounded_once(tiny):
    model = adapted(tiny.bfloat16())
    expected = {}
    for name, layer in layers_of(model):
        w, a, b = (x.weight.double() for x in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]))
        expected[name] = w + 2 * b @ a
    weights = adapters.merge(model, *engine_of(model)[:2])
    assert all(torch.equal(each, model.text_model.state_dict()[name]) for name, each in weights.items())
    assert not any("lora" in name for name, _ in model.named_modules()) and not hasattr(model, "peft_config")
    for name, layer in layers_of(model):
        assert type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16
        rounded = expected[name].float().bfloat16()
        assert (layer.weight != rounded).float().mean() < 1e-3  # float32 and double may fall on two sides of a middle
        torch.testing.assert_close(layer.weight, rounded, rtol=2**-7, atol=0)


def test_a_run_of_every_weight_that_replaces_one_of_adapters_removes_its_adapter(flags, run_main):
    """And one of adapters replaces it. Alone it is no model to train."""
    flags |= {"epochs": 1, "valid_answers": 0, "overwrite": "true"}
    adapter = flags["output_dir"] / "adapter"
    for rank, there in ((RANK, True), (RANK, True), ("none", False)):
        run_main(**flags | {"lora_rank": rank})
        assert adapter.exists() == there and (flags["output_dir"] / "config.json").exists()
        if there:
            with pytest.raises(InputError, match=f"^{adapter} is not Moondream2.*it holds an adapter") as refused:
                run_main(**flags | {"model_id": adapter, "output_dir": flags["output_dir"].with_name("other")})
            assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted runs
# ---------------------------------------------------------------------------------------------------------------------


def stop_at(step, monkeypatch):
    """The run is stopped behind so many of its steps, with a checkpoint."""
    train_steps, done = script.train_steps, count(1)

    def counting(*arguments):
        for each in train_steps(*arguments):
            if next(done) == step:
                signal.raise_signal(signal.SIGTERM)
            yield each

    monkeypatch.setattr(script, "train_steps", counting)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bits_from_a_checkpoint_of_adapters(
    flags, run_main, monkeypatch, test_file, dtype, request
):
    """Behind the best epoch of two, so that its adapters are kept as well; in float16 the loss scale goes on too."""
    if dtype == "float16":
        request.getfixturevalue("on_an_old_card")
        monkeypatch.setattr(launch, "LOSS_SCALE", 2.0**17)  # too large
    flags |= {"test_file": test_file, "checkpoint_minutes": 60, "valid_answers": 1}
    whole, cut = (flags["output_dir"].with_name(name) for name in ("whole", "cut"))
    run_main(**flags | {"output_dir": whole})
    with monkeypatch.context() as patch:
        stop_at(8, patch)
        with pytest.raises(SystemExit):
            run_main(**flags | {"output_dir": cut})
    (checkpoint,) = (cut / "checkpoints").iterdir()
    assert checkpoint.name == "epoch-000002-step-00000003"
    for name in ("model", "best"):
        weights = load_file(checkpoint / f"{name}.safetensors")
        assert sum(each.numel() for each in weights.values()) == PARAMETERS
    with pytest.raises(InputError, match=r"of a run with other settings \(LORA_RANK was 4, is 8\)"):
        run_main(**flags | {"output_dir": cut, "lora_rank": 8})
    run_main(**flags | {"output_dir": cut})
    assert log_of(cut) == log_of(whole)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "test_predictions.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# A card without bfloat16
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_an_old_card(monkeypatch):
    """The CPU, as if it had no bfloat16.

    A CPU's products in float16 take twenty times as long: here they are computed in float32 and rounded, as on a card.
    """
    monkeypatch.setattr(machine, "lacks_bfloat16", lambda device: True)
    linear = F.linear

    def of_float16(x, weight, bias=None):
        if x.dtype != torch.float16:
            return linear(x, weight, bias)
        assert weight.dtype == torch.float16
        return linear(x.float(), weight.float(), bias if bias is None else bias.float()).half()

    monkeypatch.setattr(F, "linear", of_float16)


def test_in_float16_it_trains_as_in_bfloat16(flags, run_main, on_an_old_card, monkeypatch):
    flags |= {"valid_answers": 0, "epochs": 1}
    other = flags["output_dir"].with_name("bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "lacks_bfloat16", lambda device: False)
        run_main(**flags | {"output_dir": other})
    run_main(**flags)
    weights = load_file(flags["output_dir"] / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float16}
    assert {each.dtype for each in load_file(flags["output_dir"] / "adapter/adapter_model.safetensors").values()} == {
        torch.float32
    }
    for got, expected in zip(log_of(flags["output_dir"]), log_of(other), strict=True):
        assert got["valid_loss"] == pytest.approx(expected["valid_loss"], rel=0.02)
        assert got["epoch"] == 0 or got["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)


def test_an_overflow_skips_a_step_and_lowers_the_scale(flags, run_main, on_an_old_card, monkeypatch, capsys):
    """However many there are in a row, as long as a lower scale can help."""
    steps, train_steps = [], script.train_steps

    def noting(engine, *arguments):
        trained = [p for p in engine.text_model.parameters() if p.requires_grad]
        weights = [p.detach().clone() for p in trained]
        for step in train_steps(engine, *arguments):
            moved = any(not torch.equal(a, b) for a, b in zip(weights, trained, strict=True))
            weights = [p.detach().clone() for p in trained]
            steps.append((step.is_applied, moved, engine.accelerator.scaler.get_scale()))
            yield step

    monkeypatch.setattr(launch, "LOSS_SCALE", 2.0**19)
    monkeypatch.setattr(script, "train_steps", noting)
    run_main(**flags | {"valid_answers": 0})
    skipped = [step for step in steps if not step[0]]
    assert log.BAD_STEPS < len(skipped) < len(steps) and steps[: log.BAD_STEPS + 1] == skipped[: log.BAD_STEPS + 1]
    assert [scale for _, _, scale in skipped] == [2.0 ** (18 - k) for k in range(len(skipped))]
    assert all(moved == is_applied for is_applied, moved, _ in steps)
    assert f"Step not applied: the loss scale falls to {2.0**18:g}\n" in capsys.readouterr().err


@pytest.mark.parametrize("scaler", [None, SimpleNamespace(get_scale=lambda: 2.0)], ids=["bfloat16", "float16"])
def test_steps_without_a_picture_are_no_fault_of_loss_or_scale(capsys, scaler):
    step = Step([], learning_rate=1e-3, loss=0.0, grad_norm=0.0, tokens=0, is_applied=False, wishes=[])
    log.bad_step(step, log.BAD_STEPS - 1, scaler)
    assert capsys.readouterr().err == "Step not applied: none of its pictures can be read any more\n"
    with pytest.raises(
        InputError, match="3 steps in a row without a picture that can be read: bring the pictures back"
    ):
        log.bad_step(step, log.BAD_STEPS, scaler)


def test_where_no_scale_helps_the_run_ends(capsys):
    step = Step([], learning_rate=1e-3, loss=2.0, grad_norm=math.inf, tokens=5, is_applied=False, wishes=[])
    for scale, ends in ((2.0, False), (0.5, True)):
        scaler = SimpleNamespace(get_scale=lambda scale=scale: scale)
        with pytest.raises(InputError, match="5 steps in a row") if ends else pytest.MonkeyPatch.context():
            log.bad_step(step, 5, scaler)
    with pytest.raises(InputError):
        log.bad_step(step._replace(loss=math.nan), 3, SimpleNamespace(get_scale=lambda: 2.0))


def test_without_a_rank_an_old_card_is_told_of_one(on_an_old_card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(
        InputError, match="^Tesla T4 has no bfloat16 of its own.*: --lora_rank 16 trains adapters on it"
    ):
        launch.start()
    assert launch.start(lora_rank=16).scaler.is_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# Bad values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "LORA_RANK must be greater than 0, not 0"),
        ("many", "LORA_RANK must be a whole number, not many"),
        (65, "LORA_RANK 65 is above 64, the width of the layers"),
    ],
)
def test_bad_ranks_are_one_line(flags, run_main, rank, message):
    with pytest.raises(InputError) as refused:
        run_main(**flags | {"lora_rank": rank})
    assert str(refused.value) == message


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    refuse_or_warn(None, 3e-5)
    with pytest.raises(
        InputError, match=f"^LORA_RANK needs the package of its adapters: pip install {adapters.PACKAGE}$"
    ):
        refuse_or_warn(16, 1e-3)


def test_the_full_runs_rate_is_warned_of(capsys):
    refuse_or_warn(None, script.LEARNING_RATE)
    refuse_or_warn(16, 1e-3)
    assert capsys.readouterr().err == ""
    refuse_or_warn(16, script.LEARNING_RATE)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: LEARNING_RATE 3e-05 is one for every weight") and warning.count("\n") == 1
