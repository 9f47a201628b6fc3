"""AdamW against torch's own in float32, the bits behind a bfloat16 weight, weight decay, and the rate's schedules."""

import copy
import math
import shutil
from functools import partial

import pytest
import torch
from torch._inductor import config as inductor

from moondream2 import optimizer as module
from moondream2.optimizer import (
    GOLDEN,
    AdamW,
    build_optimizer,
    build_scheduler,
    from_int8,
    join,
    largest_ratio,
    split,
    to_int8,
)
from tests import compare_optimizers
from tests.child import Child


def whole(optimizer, p):
    """The number that a parameter and what is kept beside it stand for, in float64."""
    low = optimizer.state[p].get("low")
    return (p.detach() if low is None else join(p.detach(), low)).double()


def steps(optimizer, parameters, count, seed=0):
    """So many steps, with gradients that are the same for each optimizer."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).mul(1e-3).bfloat16().to(p.dtype)
        optimizer.step()


def parameters(dtype, *shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).mul(0.02).bfloat16().to(dtype)) for s in shapes]


def test_in_float32_it_is_torchs_adamw():
    ours, theirs = (parameters(torch.float32, (30, 40), (50,), (7,)) for _ in range(2))
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    steps(AdamW(ours, **settings), ours, 20)
    steps(torch.optim.AdamW(theirs, eps=1e-8, **settings), theirs, 20)
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)


def test_all_sixteen_bits_behind_a_weight_make_it_float32():
    """Of a vector all bits are kept: its numbers are those of a float32 master weight, to the last bit."""
    (p,) = parameters(torch.bfloat16, (1000,))
    optimizer = AdamW([p], 3e-5, (0.9, 0.99), 0.0)
    master, mean, square = p.detach().float(), torch.zeros_like(p), torch.zeros_like(p)
    for k in range(1, 21):
        steps(optimizer, [p], 1, seed=k)
        grad = p.grad.float()
        mean32 = torch.lerp(mean.float(), grad, 1 - 0.9)
        square32 = square.float().mul(0.99).addcmul(grad, grad, value=1 - 0.99)
        rate, correction = torch.tensor([3e-5 / (1 - 0.9**k), 1 / math.sqrt(1 - 0.99**k)])
        master = master - (square32.sqrt() * correction + 1e-8).reciprocal() * mean32 * rate
        bits = square32.view(torch.int32) + int(k * GOLDEN % 1 * 2**16)
        mean, square = mean32.bfloat16(), (bits >> 16 << 16).view(torch.float32).bfloat16()
        assert torch.equal(join(p.detach(), optimizer.state[p]["low"]), master)
    assert torch.equal(p.detach(), master.bfloat16())


@pytest.mark.parametrize(("low", "error"), [(torch.int8, 2**-16), (torch.int32, 0)])
def test_a_number_is_split_into_the_nearest_bfloat16_and_the_bits_behind_it(low, error):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1 << 18, generator=generator) * 10.0 ** torch.arange(-10, 6).repeat(1 << 14)
    numbers = torch.cat([numbers, torch.tensor([0.0, -0.0, 1.0, 1.99999988, -0.99999994, 1e-37, -3e38])])
    weight, rest = torch.empty_like(numbers, dtype=torch.bfloat16), torch.empty_like(numbers, dtype=low)
    split(numbers.clone(), weight, rest)
    joined = join(weight, rest)
    assert ((joined - numbers).abs() <= error * numbers.abs()).all()
    nearest = (numbers - numbers.bfloat16()).abs()
    assert ((numbers - weight).abs() <= nearest + 2 * error * numbers.abs()).all()
    assert (weight == numbers.bfloat16()).float().mean() > 0.99  # the others lie in the middle of two


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"), [("bfloat16", (8, 9), 8), ("bfloat16", (9,), 12), ("float32", (8, 9), 16)]
)
def test_bytes_a_parameter_with_its_gradient(dtype, shape, expected):
    p = parameters(getattr(torch, dtype), shape)
    optimizer = AdamW(p, 1e-3, (0.9, 0.99), 0.0)
    steps(optimizer, p, 1)
    assert compare_optimizers.bytes_a_parameter(optimizer) == expected


def test_the_comparison_trains_and_measures():
    exact, ours, plain = (compare_optimizers.width_run(name, 64, 0, 60) for name in ("float32", "ours", "bfloat16"))
    assert abs(ours["loss"] - exact["loss"]) < 0.002 < plain["loss"] - exact["loss"]
    assert [round(each["bytes"]) for each in (exact, ours, plain)] == [16, 8, 8]


def test_matrices_follow_float32_where_plain_bfloat16_does_not_move():
    ours, exact, plain = (parameters(dtype, (60, 70)) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16))
    start = exact[0].detach().clone()
    settings = {"lr": 3e-6, "betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizer = AdamW(ours, **settings)
    steps(optimizer, ours, 50)
    steps(torch.optim.AdamW(exact, eps=1e-8, **settings), exact, 50)
    steps(torch.optim.AdamW(plain, eps=1e-8, **settings), plain, 50)
    moved = exact[0].detach().double() - start
    error = (whole(optimizer, ours[0]) - exact[0].double()).norm() / moved.norm()
    assert error < 0.05 < (plain[0].double() - exact[0].double()).norm() / moved.norm()


def test_the_mean_in_eight_bits_is_right_over_steps():
    """Each of 64 steps is off by a step of 8 bits at most, and their average by a tenth of one."""
    generator = torch.Generator().manual_seed(0)
    root = torch.rand(5000, generator=generator) * 10.0 ** torch.arange(-7, 3).repeat(500)
    mean = root * (torch.rand(5000, generator=generator) * 4 - 2)
    mean[::50] = 0.0
    most = largest_ratio(0.9, 0.99)
    stored = [to_int8(mean, root, most, torch.tensor(step * GOLDEN % 1)).to(torch.int8) for step in range(1, 65)]
    shares = torch.stack([from_int8(each, root, most) for each in stored]) / root
    share = mean / root
    step = 2 * (share.abs() * most).sqrt() / 127 + 2 * most / 127**2  # a square root's, on either side
    assert ((shares - share).abs() < step).all()
    assert ((shares.mean(0) - share).abs() < step / 10).all()
    assert (shares[:, ::50] == 0).all() and stored[0].unique().numel() > 200


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999), (0.8, 0.95)])
def test_no_gradients_bring_the_mean_beyond_what_eight_bits_hold(betas):
    """The worst there are, each so much larger than the one before, come to within a hundredth of it."""
    beta1, beta2 = betas
    mean = square = 0.0
    for step in range(200):
        grad = (beta1 / beta2) ** (200 - step)
        mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
    assert 0.99 < mean / math.sqrt(square) / largest_ratio(beta1, beta2) <= 1


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_the_mean_of_squares_follows_its_gradients(share):
    """In bfloat16 too, though a step changes it by less than bfloat16 shows; `share` of the steps have a gradient."""
    (p,) = parameters(torch.bfloat16, (40, 50))
    optimizer = AdamW([p], 1e-5, (0.9, 0.999), 0.0)
    exact, generator, ratios = torch.zeros(40, 50), torch.Generator().manual_seed(0), []
    for _ in range(1500):
        p.grad = (1e-4 * (torch.rand(40, 50, generator=generator) <= share)).bfloat16()
        optimizer.step()
        exact = 0.999 * exact + 0.001 * p.grad.float() ** 2
        ratios.append((optimizer.state[p]["exp_avg_sq"].float().mean() / exact.mean()).item())
    assert sum(ratios[500:]) / 1000 == pytest.approx(1, abs=0.01)


def test_after_its_last_gradient_a_matrix_comes_to_rest():
    """As far from where it was as in float32, though its mean has 8 bits: rare words' embeddings see few gradients."""
    (ours,), (exact,) = (parameters(dtype, (60, 70)) for dtype in (torch.bfloat16, torch.float32))
    start = exact.detach().double().clone()
    optimizer = AdamW([ours], 1e-4, (0.9, 0.99), 0.0)
    theirs = torch.optim.AdamW([exact], 1e-4, (0.9, 0.99), weight_decay=0.0)
    for step in range(300):
        for each, p in ((optimizer, ours), (theirs, exact)):
            steps(each, [p], 1) if step == 0 else each.step()
            p.grad.zero_()
    moved, expected = whole(optimizer, ours) - start, exact.detach().double() - start
    assert (moved * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.04)
    assert (moved - expected).norm() / expected.norm() < 0.05


def test_parts_are_updated_as_a_whole_is(monkeypatch):
    one, several = (parameters(torch.bfloat16, (30, 40), (50,), (7,)) for _ in range(2))
    steps(AdamW(one, 1e-3, (0.9, 0.99), 0.1), one, 3)
    monkeypatch.setattr(module, "CPU_PART", 77)
    steps(AdamW(several, 1e-3, (0.9, 0.99), 0.1), several, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@pytest.mark.parametrize("place", ["CPU", "card"])
def test_a_step_is_scaled_and_skipped_as_torchs_fused_one_is(request, place):
    """By numbers on the device, under torch's names."""
    if place == "card":
        request.getfixturevalue("as_on_a_card")
    ours, theirs = (parameters(torch.float32, (30, 40), (50,), (7,)) for _ in range(2))
    for adamw, trained in ((AdamW(ours, 1e-3, (0.9, 0.99), 0.1), ours), (fused(theirs), theirs)):
        for scale, found_inf in ((3.0, 0.0), (0.5, 0.0), (7.0, 1.0), (0.01, 0.0)):
            adamw.grad_scale, adamw.found_inf = torch.tensor(scale), torch.tensor(found_inf)
            steps(adamw, trained, 1, seed=int(scale))
            if found_inf and trained is ours:
                adamw.take_back()
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)


def fused(trained):
    return torch.optim.AdamW(trained, 1e-3, (0.9, 0.99), eps=1e-8, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("low", [torch.int8, torch.int32, None])
def test_a_kernel_that_is_told_to_changes_nothing(low):
    """Not even where gradients are not finite; and all else as `update` does."""
    generator, dtype = torch.Generator().manual_seed(0), torch.float32 if low is None else torch.bfloat16
    mean = torch.int8 if low == torch.int8 else dtype
    kinds = [dtype, dtype, mean, dtype, *([] if low is None else [low])]
    for found_inf in (0.0, 1.0):
        tensors = [torch.rand(999, generator=generator).mul(100).to(kind) for kind in kinds]
        tensors[1][::7] = math.nan if found_inf else 1.0
        before, expected = ([each.clone() for each in tensors] for _ in range(2))
        numbers = torch.tensor([0.9, 1e-3, 1.0, 0.3, 0.5, found_inf]), 0.9, 0.99, 1e-8
        module.update_if_finite(*tensors, numbers=numbers)
        module.update(*expected, numbers=numbers)
        expected = before if found_inf else expected
        for got, each in zip(tensors, expected, strict=True):
            torch.testing.assert_close(got, each, rtol=0, atol=0, equal_nan=True)


def trained():
    """What parameters of several shapes stand for after steps with gradients that lie in one tensor."""
    torch.manual_seed(0)
    shapes = [(60, 70), (50,), (64, 64), (4099,), (3000,), (8, 8), (300, 41)]
    parameters = [torch.nn.Parameter(torch.randn(shape).mul(0.02).bfloat16()) for shape in shapes]
    adamw = AdamW(parameters, 1e-4, (0.9, 0.99), 0.1)
    for step in range(12):
        adamw.param_groups[0]["lr"] = 1e-4 / (step + 1)
        bucket = torch.randn(sum(p.numel() for p in parameters)).bfloat16()  # as several processes hold gradients
        for p, grad in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
        adamw.step()
    return [join(p.detach(), adamw.state[p]["low"]) for p in parameters]


def compiled_and_plain(compiler):
    """Prints how many graphs the compiled update took, once a CPU's and a card's have been compared with the plain one.

    The CPU's is taken for all that has more than a thousand elements.
    """
    inductor.cpp.cxx, module.CPU_PART = compiler, 1 << 12
    expected, settings = trained(), torch._dynamo.config.get_config_copy()
    module.LARGE = 1000
    torch.testing.assert_close(trained(), expected, rtol=2**-14, atol=1e-7)
    with torch.no_grad():
        compiled = module.kernel(module.update_if_finite, torch.device("cpu"), torch.bfloat16, 0.9, 0.99, 1e-8)
    module.update_on = lambda *arguments: compiled
    torch.testing.assert_close(trained(), expected, rtol=2**-14, atol=1e-7)
    kinds = torch.bfloat16, torch.bfloat16, torch.int8, torch.bfloat16, torch.int8
    parts = [torch.full([4099], 2.0, dtype=kind) for kind in kinds]
    parts[1] *= float("nan")
    with torch.no_grad():
        compiled(*parts, numbers=(torch.tensor([0.9, 1e-3, 1.0, 0.3, 0.5, 1.0]), 0.9, 0.99, 1e-8))
    assert all((each == 2).all() for each in parts if each is not parts[1])
    assert torch._dynamo.config.get_config_copy() == settings
    print(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.skipif(not shutil.which("g++"), reason="compiles for this machine's CPU, which takes g++")
@pytest.mark.parametrize(
    ("compiler", "graphs", "slower"), [pytest.param("g++", 4, [], marks=pytest.mark.slow), ("/nonexistent", 0, [3, 30])]
)
def test_compiled_it_does_the_same_and_without_a_compiler_too(compiler, graphs, slower, tmp_path):
    """One graph for each kind of parameter, whatever their sizes, parts and rates; without a compiler one line.

    Each on a CPU and as on a card.
    """
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # what was compiled before needs no compiler
    environment = None if graphs else cache
    child = Child(partial(compiled_and_plain, compiler), tmp_path / "out.txt", environment=environment)
    assert child.wait() == 0, child.text()
    *said, last = child.text().splitlines()
    assert int(last) == graphs
    assert len(said) == len(slower), said
    assert all(
        f" {times} times slower" in line and "compiler" in line for times, line in zip(slower, said, strict=True)
    )


def test_a_state_comes_back_from_a_checkpoint_bit_for_bit():
    one, other = parameters(torch.bfloat16, (30, 40), (50,)), parameters(torch.bfloat16, (30, 40), (50,))
    first = AdamW(one, 1e-3, (0.9, 0.99), 0.1)
    steps(first, one, 3)
    second = AdamW(other, 1e-3, (0.9, 0.99), 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(one, other, strict=True):
        q.data.copy_(p.data)
        assert [each.dtype for each in first.state[p].values()] == [each.dtype for each in second.state[q].values()]
    assert second.state[other[0]]["exp_avg"].dtype == torch.int8
    assert second.state[other[0]]["low"].dtype == torch.int8 and second.state[other[1]]["low"].dtype == torch.int32
    for optimizer, each in ((first, one), (second, other)):
        steps(optimizer, each, 2, seed=5)
    for p, q in zip(one, other, strict=True):
        assert torch.equal(whole(first, p), whole(second, q))


def test_norms_and_biases_are_not_decayed(tiny):
    decayed, exempt = build_optimizer(tiny.text_model, 1e-3, 0.1, (0.9, 0.99)).param_groups
    names = {id(p): name for name, p in tiny.text_model.named_parameters()}
    assert exempt["weight_decay"] == 0 and decayed["weight_decay"] == 0.1
    assert {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight"}
    assert all(names[id(p)].endswith((".bias", ".ln.weight")) for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_decay_acts(dtype):
    """As much as it should, at a rate at which plain bfloat16 loses all of it."""
    (p,), (plain,) = parameters(dtype, (64, 64)), parameters(dtype, (64, 64))
    start = p.detach().double().clone()
    optimizer = AdamW([p], 3e-5, (0.9, 0.99), 0.1)
    theirs = torch.optim.AdamW([plain], lr=3e-5, weight_decay=0.1)
    for _ in range(1000):
        p.grad, plain.grad = torch.zeros_like(p), torch.zeros_like(p)
        optimizer.step()
        theirs.step()
    shrunk = 1 - (whole(optimizer, p) * start).sum() / start.square().sum()
    assert shrunk.item() == pytest.approx(1 - (1 - 3e-5 * 0.1) ** 1000, rel=0.1)
    if dtype == torch.bfloat16:
        assert torch.equal(plain.detach().double(), start)


@pytest.mark.parametrize(
    ("name", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 1, [1, 1, 1, 1]),
        ("constant", 2, [1 / 2, 1, 1, 1]),
        ("constant", 8, [1 / 8, 2 / 8, 3 / 8, 4 / 8]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, [1 / 2, 1, 2 / 3, 1 / 3]),
        ("linear", 4, [1 / 4, 2 / 4, 3 / 4, 1]),
        ("cosine", 0, [1, (1 + math.sqrt(1 / 2)) / 2, 1 / 2, (1 - math.sqrt(1 / 2)) / 2]),
        ("cosine", 2, [1 / 2, 1, 3 / 4, 1 / 4]),
    ],
)
def test_schedules(name, warmup, rates):
    """Four steps: none is taken at a rate of 0, neither the first of a warmup nor the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-5)
    scheduler = build_scheduler(optimizer, name, warmup, 4)
    got = []
    for _ in rates:
        got.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert got == pytest.approx([3e-5 * rate for rate in rates], rel=1e-12)


def test_small_tensors_are_updated_together(tiny, monkeypatch):
    """One kernel for all vectors of a group: to start one for each takes longer than its work."""
    sizes, apply = [], module.apply
    monkeypatch.setattr(module, "apply", lambda tensors, *more: (sizes.append(len(tensors[0])), apply(tensors, *more)))
    optimizer = build_optimizer(tiny.text_model, 1e-3, 0.1, (0.9, 0.99))
    matrices, vectors = (group["params"] for group in optimizer.param_groups)
    steps(optimizer, [*matrices, *vectors], 1)
    assert sizes == [*(p.numel() for p in matrices), sum(p.numel() for p in vectors)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_kernel_updates_large_parts_and_a_cpu_without_one_small_ones(device, monkeypatch):
    """ "meta" stands in for a card: a device that is no CPU."""
    sizes, part = [], {"cpu": module.CPU_PART, "meta": module.GPU_PART}[device]
    function = {"cpu": "update", "meta": "update_if_finite"}[device]
    monkeypatch.setattr(module, function, lambda weight, *more, numbers: sizes.append(len(weight)))
    module.apply([torch.empty(part + 1, device=device)] * 4, None, 0.9, 0.99, 1e-8)
    assert sizes == [part, 1]


def test_large_tensors_and_a_gpus_are_updated_by_a_kernel_and_others_uncompiled(monkeypatch):
    update, if_finite, constants = module.update, module.update_if_finite, (0.9, 0.99, 1e-8)
    monkeypatch.setattr(module, "kernel", lambda function, device, *kind: (function, device.type))
    kinds = [(torch.device(name), torch.bfloat16, size) for name in ("cpu", "cuda", "mps") for size in (9, 1 << 22)]
    got = [module.update_on(*kind, *constants) for kind in kinds]
    assert got == [update, (update, "cpu"), *[(if_finite, "cuda")] * 2, *[if_finite] * 2]


def test_a_state_goes_to_the_device_of_its_parameter():
    saved, other = parameters(torch.bfloat16, (30, 40), (50,)), parameters(torch.bfloat16, (30, 40), (50,))
    first = AdamW(saved, 1e-3, (0.9, 0.99), 0.1)
    steps(first, saved, 1)
    moved = [torch.nn.Parameter(p.to("meta")) for p in other]
    second = AdamW(moved, 1e-3, (0.9, 0.99), 0.1)
    second.load_state_dict(first.state_dict())
    assert {each.device.type for p in moved for each in second.state[p].values()} == {"meta"}
