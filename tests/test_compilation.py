"""COMPILE: compiled layers compute what layers do, all of it is compiled before training, and failing is said."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moondream2 import adapters, compilation
from moondream2.compilation import compile_layers
from moondream2.modeling_moondream2 import lay_out_rows, row_mask
from tests.shared import TINY, TINY_2025, constants

ROWS = [[1], [3], [1, 1, 1], [2, 1], [2, 2, 2]]  # the questions of each row of a micro-batch


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def deep(tiny):
    """A model two of whose four layers are compiled."""
    tiny.text_model.layers.insert(1, copy.deepcopy(tiny.text_model.layers[1]))
    return tiny.train()


def results(model, kinds=ROWS):
    """For each kind of micro-batch the logits and the length of each gradient."""
    found, image_tokens = [], model.config.image_tokens
    for n, questions in enumerate(kinds):
        texts = [[(list(range(20, 25 + n + k)), [7, 8 + n]) for k in range(asked)] for asked in questions]
        rows = lay_out_rows(texts, 0, image_tokens)
        mask = row_mask(rows["document_ids"], 1 + image_tokens) if max(questions) > 1 else None
        torch.manual_seed(n)
        embeds = torch.randn(len(questions), image_tokens, model.config.text_config.hidden_size)
        inputs = {name: rows[name] for name in ("input_ids", "position_ids", "answer_positions")}
        model.zero_grad()
        logits = model.text_model(**inputs, attention_mask=mask, image_embeds=embeds).logits
        logits.square().mean().backward()
        norms = [p.grad.norm() for p in model.text_model.parameters() if p.grad is not None]
        found.append((logits.detach(), torch.stack(norms)))
    return found


def assert_the_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for each, plain in zip(one, other, strict=True):
            torch.testing.assert_close(each, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small_model", "rank", "rows", "kinds"),
    [(TINY, None, compilation.ROWS, ROWS), (TINY_2025, 4, (2,), ROWS[2:])],
    indirect=["small_model"],
    ids=["every weight", "adapters, checkpointed, of several rows"],
)
def test_compiled_layers_say_the_same_and_all_is_compiled_before(deep, rank, rows, kinds, monkeypatch, capsys):
    """Once for all layers: of every weight, and of adapters with GRADIENT_CHECKPOINTING. Others run as they are."""
    monkeypatch.setattr(compilation, "ROWS", rows)
    deep.vision_encoder.requires_grad_(False)
    if rank:
        adapters.add(deep, constants(lora_rank=rank))
        deep.activation_checkpointing_enable()
    expected, counter = results(deep, kinds), CompileCounterWithBackend("aot_eager")
    compile_layers(deep.text_model, backend=counter)
    out, err = capsys.readouterr()
    assert out.startswith("COMPILE: the layers are compiled, in ") and not err
    assert all(p.grad is None for p in deep.text_model.parameters())
    graphs, operations = counter.frame_count, counter.op_count
    assert 0 <= graphs - 2 * len(rows) <= 1  # with and without a mask; the first may be for one length alone
    assert_the_same(results(deep, kinds), expected)
    assert (counter.frame_count, counter.op_count) == (graphs, operations)
    assert [layer._compiled_call_impl is None for layer in deep.text_model.layers] == [True, False, False, True]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiles for this machine's CPU, which takes g++")
def test_kernels_say_the_same(deep, monkeypatch, capsys):
    """By the compiler that a run uses, of several rows with a mask, whose kernels take a quarter of the time."""
    monkeypatch.setattr(compilation, "ROWS", (2,))
    monkeypatch.setattr(compilation, "QUESTIONS", (2,))
    expected = results(deep, ROWS[3:])
    compile_layers(deep.text_model)
    assert capsys.readouterr().out.startswith("COMPILE: the layers are compiled, in ")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_the_same(results(deep, ROWS[3:]), expected)


def test_where_it_fails_a_line_says_so_and_layers_run_as_they_are(deep, capsys):
    def broken(*arguments, **settings):
        raise RuntimeError("no compiler\nand more")

    expected = results(deep)
    compile_layers(deep.text_model, backend=broken)
    out, err = capsys.readouterr()
    assert not out and err.startswith("COMPILE is in vain, layers run uncompiled: torch.compile failed: ")
    assert "no compiler" in err and err.count("\n") == 1
    assert all(layer._compiled_call_impl is None for layer in deep.text_model.layers)
    assert_the_same(results(deep), expected)


def test_what_is_sharded_is_left_as_it_is(deep, capsys):
    compile_layers(deep.text_model, is_sharded=True)
    assert capsys.readouterr().out == "COMPILE is left out: with FSDP it was never tried\n"
    assert all(layer._compiled_call_impl is None for layer in deep.text_model.layers)
