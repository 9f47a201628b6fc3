"""AdamW for bfloat16 weights that loses no small update, and the schedule of the learning rate.

A bfloat16 number has 8 significant bits: add 3e-5 to a weight of 0.02, and mostly nothing changes. So this AdamW
computes each step in float32, and keeps some of the bits that bfloat16 has no room for. What they take it saves on the
first moment. Bytes for each parameter, as many as AdamW in bfloat16 throughout takes for a matrix:

| tensor     | what it holds                                            | matrix | vector |
| ---------- | -------------------------------------------------------- | ------ | ------ |
| weight     | bfloat16, the upper 16 bits of a float32 number          | 2      | 2      |
| low        | the next 8 bits of that number; of a vector all 16       | 1      | 4      |
| grad       | bfloat16                                                 | 2      | 2      |
| exp_avg    | mean of gradients, int8 (see `to_int8`); bfloat16        | 1      | 2      |
| exp_avg_sq | mean of their squares, bfloat16                          | 2      | 2      |

Vectors are norms and biases: a norm's weights are near 1, where a small update needs all the bits, and there are few of
them. docs/optimizer.md compares this AdamW with float32 and with two libraries'.
"""

import math
import sys
from functools import cache
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

CPU_PART, GPU_PART = 1 << 17, 1 << 24  # elements updated at a time, to need little on the way: a CPU's cache has it
LARGE = 1 << 22  # elements of a tensor that earns back what compiling takes, on a CPU: half a minute at most
TRIAL = 1 << 20  # elements of a trial: so many that Triton lays the kernel out for large tensors
GOLDEN = (math.sqrt(5) - 1) / 2
LEAST_DECAY = 2.0**-14  # of a weight with 16 significant bits, a smaller share may round away


class AdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101), computed in float32 whatever the weights' type.

    A parameter's state is `exp_avg`, `exp_avg_sq` and, for a bfloat16 one, `low`: see the head of this file. For a
    float32 parameter this is torch's AdamW.

    As of torch's fused optimizers, a step may be told by tensors on the device that the host has not read:
    `grad_scale`, by which it divides gradients, and `found_inf`, 1 where it is to change nothing.
    """

    _step_supports_amp_scaling = True  # torch's name for it
    grad_scale = found_inf = None

    def __init__(self, params, lr, betas, weight_decay, eps=1e-8):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "step": 0, "owed": 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        scale, found_inf = self.grad_scale, self.found_inf
        self.before = [(group["step"], group["owed"]) for group in self.param_groups]
        if is_known(found_inf):
            return
        for group in self.param_groups:
            numbers, trained = self.next_numbers(group), [p for p in group["params"] if p.grad is not None]
            if trained:
                numbers = with_scale(numbers, scale, found_inf, trained[0].device)
                self.apply_all(trained, numbers, *group["betas"], group["eps"])

    def apply_all(self, parameters, *numbers):
        vectors = []
        for p in parameters:
            state = self.state_of(p)
            tensors = p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], state.get("low")
            tensors = [local(each) for each in tensors if each is not None]
            if p.dim() > 1:
                apply(tensors, *numbers)
            else:
                vectors.append(tensors)
        if vectors:
            apply_together(vectors, *numbers)

    def take_back(self):
        """The last step's `found_inf` was 1, as the host knows by now: it does not count."""
        for group, (step, owed) in zip(self.param_groups, self.before, strict=True):
            group["step"], group["owed"] = step, owed

    def next_numbers(self, group):
        """Counts a group's step; returns what `update` takes of it, without the scale of gradients."""
        group["step"] += 1
        correction1, correction2 = (1 - beta ** group["step"] for beta in group["betas"])
        offset = group["step"] * GOLDEN % 1
        return [1 - self.decay(group), group["lr"] / correction1, 1 / math.sqrt(correction2), offset]

    def decay(self, group):
        """The share of its weights that a group loses in this step.

        A step's own, 3e-7 at the default constants, would round away. So what is owed adds up over some 200 steps,
        until it is large enough to count.
        """
        group["owed"] += group["lr"] * group["weight_decay"]
        if group["owed"] <= LEAST_DECAY:
            return 0.0
        decay, group["owed"] = group["owed"], 0.0
        return decay

    def state_of(self, p):
        state = self.state[p]
        if not state:
            is_bfloat16, is_matrix = p.dtype == torch.bfloat16, p.dim() > 1
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.int8 if is_bfloat16 and is_matrix else p.dtype)
            state["exp_avg_sq"] = torch.zeros_like(p)
            if is_bfloat16:  # a vector's 16 bits in int32, as NCCL and gloo don't send int16
                state["low"] = torch.zeros_like(p, dtype=torch.int8 if is_matrix else torch.int32)
        return state

    def load_state_dict(self, state_dict):
        """As torch's, which would also cast each state to its weight's type: not here, where integers hold bits."""
        super().load_state_dict({**state_dict, "state": {}})
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            if i in state_dict["state"]:
                self.state[p] = {name: each.to(p.device) for name, each in state_dict["state"][i].items()}


def is_known(found_inf):
    """Whether `found_inf` is 1 where it costs nothing to ask, on a CPU; on a GPU the kernel asks."""
    return found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() == 1


def with_scale(numbers, scale, found_inf, device):
    """The numbers of a step as a tensor on the device, with 1 / `scale` and `found_inf` behind them."""
    if scale is None:
        return torch.tensor([*numbers, 1.0, 0.0], device=device)
    is_cuda = device.type == "cuda"  # from pinned memory: else the host would wait for all that the GPU has to do
    numbers = torch.tensor(numbers, pin_memory=is_cuda).to(device, non_blocking=is_cuda)
    return torch.cat([numbers, torch.stack([scale.reciprocal(), found_inf])])


def local(tensor):
    """This process's part of a sharded tensor, flat."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def apply(tensors, numbers, *constants):
    """`update` on flat tensors, part by part; compiled, each part is one kernel."""
    function = update_on(tensors[0].device, tensors[0].dtype, len(tensors[0]), *constants)
    part = CPU_PART if function is update else GPU_PART
    for parts in zip(*(tensor.split(part) for tensor in tensors), strict=True):
        function(*parts, numbers=(numbers, *constants))


def update_on(device, dtype, size, *constants):
    """`update` as a device runs it on so many elements: one kernel on a GPU, and on a CPU where they are many."""
    function = update if device.type == "cpu" else update_if_finite
    if device.type == "cuda" or (device.type == "cpu" and size >= LARGE):
        return kernel(function, device, dtype, *constants)
    return function


def apply_together(vectors, *numbers):
    """`apply` on many small tensors as on one: to start a kernel for each takes longer than its work."""
    columns = list(zip(*vectors, strict=True))
    joined = [torch.cat(column) for column in columns]
    apply(joined, *numbers)
    sizes = [len(each) for each in columns[0]]
    for column, each in zip(columns, joined, strict=True):
        torch._foreach_copy_(column, each.split(sizes))


@cache
def kernel(function, device, dtype, *constants):
    """The function, compiled for weights of a type, so that a step reads and writes each number once.

    Where that fails, most often for want of a C compiler, one line says so and the function runs as it stands. A
    trial on other tensors finds that out: a kernel that failed in the middle of a step would leave weights half done.
    """
    compiled = torch.compile(function, dynamic=True)
    # What `update` is given of a bfloat16 matrix and of such a vector; of all others.
    split = [(dtype, dtype, exp_avg, dtype, low) for exp_avg, low in ((torch.int8, torch.int8), (dtype, torch.int32))]
    try:
        for types in split if dtype == torch.bfloat16 else [[dtype] * 4]:
            tensors = [torch.zeros(TRIAL, dtype=each, device=device) for each in types]
            compiled(*tensors, numbers=(torch.zeros(6, device=device), *constants))
    except Exception as error:  # torch's, Triton's or the compiler's own
        reason, times = " ".join(str(error).splitlines()[:1]), 3 if function is update else 30
        slower = f"AdamW runs uncompiled, its steps some {times} times slower"
        print(f"{slower}: torch.compile failed: {reason}", file=sys.stderr)
        return function
    return compiled


def update_if_finite(weight, grad, *state, numbers):
    """`update`, or nothing of it where `found_inf` is 1; compiled, this takes no more reading and writing."""
    written = weight, *state
    before = [tensor.clone() for tensor in written]
    update(weight, grad, *state, numbers=numbers)
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(torch.where(numbers[0][-1] > 0, old, tensor))


def update(weight, grad, exp_avg, exp_avg_sq, low=None, *, numbers):
    """One step of AdamW on flat tensors, in place.

    Args:
        numbers: a tensor of six, which change from step to step: the share of a weight that its decay leaves, the rate
            over the mean's bias correction, 1 over the root of the squares', the offset of rounding (see
            `to_bfloat16`), by what gradients are multiplied, and `found_inf`, which has no say here. Then beta1, beta2
            and epsilon.
    """
    (keep, rate, correction, offset, factor, _), beta1, beta2, eps = numbers
    is_int8, bound = exp_avg.dtype == torch.int8, largest_ratio(beta1, beta2)
    weight32 = weight if low is None else join(weight, low)
    grad, square = grad.to(torch.float32, copy=True).mul_(factor), exp_avg_sq.float()
    mean = from_int8(exp_avg, square.sqrt(), bound) if is_int8 else exp_avg.float()
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square.sqrt().add_(1e-30)  # to divide by, where all gradients were 0
    exp_avg_sq.copy_(square if low is None else to_bfloat16(square, offset))
    exp_avg.copy_(to_int8(mean, root, bound, offset) if is_int8 else mean)
    weight32.mul_(keep).sub_(root.mul_(correction).add_(eps).reciprocal_().mul_(mean).mul_(rate))
    if low is not None:
        split(weight32, weight, low)


def to_bfloat16(square, offset):
    """The mean of squares, rounded to bfloat16 in place: up if the fraction cut off and `offset` add up to 1.

    A step changes it by less than bfloat16 shows, so that rounded to the nearest it would never move. Stochastic
    rounding, where `offset` is a random number in [0, 1), is right on average. Here `offset` is the step's
    number times the golden ratio, less its whole part: this covers [0, 1) evenly, and needs no random state in a
    checkpoint.
    """
    square.view(torch.int32).add_((offset * 2**16).int()).bitwise_and_(-1 << 16)
    return square


def to_int8(mean, root, bound, offset):
    """The mean of gradients as numbers from -127 to 127, still in float32: a copy to int8 cuts their fractions off.

    The numbers say how large |mean| / root is, of which the most is `bound`. Equal steps of its square root are finest
    near 0, where most means are. It is rounded as in `to_bfloat16`, so that a mean without new gradients decays to 0.
    """
    size = mean.abs().div_(root).mul_(127**2 / bound).sqrt_().add_(offset).clamp_(max=127)
    return size.copysign_(mean)


def from_int8(stored, root, bound):
    """The mean of gradients that `to_int8` stored."""
    size = stored.float()
    return size.mul_(size.abs()).mul_(root).mul_(bound / 127**2)


def largest_ratio(beta1, beta2):
    """The most that |mean of gradients| / sqrt(mean of their squares) can be, by the Cauchy-Schwarz inequality.

    It holds where beta1**2 <= 0.99 * beta2, as with any betas in use.
    """
    return (1 - beta1) / math.sqrt((1 - beta2) * max(1 - beta1**2 / beta2, 0.01))


def join(weight, low):
    """The float32 numbers that `split` took apart."""
    return weight.float().view(torch.int32).add_(low, alpha=1 << unused_bits(low)).view(torch.float32)


def split(weight32, weight, low):
    """Takes float32 numbers apart: `weight` gets the nearest bfloat16, `low` what that leaves, above or below 0.

    `low` counts in units of a float32 number's last bit. Where it has 8 bits, the numbers are first rounded, and it
    counts in 256 of these units. The float32 numbers are lost.
    """
    bits, unused = weight32.view(torch.int32), unused_bits(low)
    if unused:
        bits.add_(1 << unused - 1).bitwise_and_(-1 << unused)
    high = bits.add(1 << 15).bitwise_and_(-1 << 16)
    weight.copy_(high.view(torch.float32))
    low.copy_(bits.sub_(high).bitwise_right_shift_(unused))


def unused_bits(low):
    """How many of a float32 number's last bits are not kept."""
    return 8 if low.dtype == torch.int8 else 0


class Step(NamedTuple):
    """What came of an optimizer step. `grad_norm` is the gradient's length before clipping."""

    batches: list  # its micro-batches
    learning_rate: float
    loss: float
    grad_norm: float
    tokens: int
    is_applied: bool
    wishes: list  # of all processes


class Sent:
    """An optimizer step that was sent to the device. The host, which need not wait, learns later what came of it.

    Args:
        scores: tensors on the device: loss, length of the gradient, tokens, `found_inf`, then what else is to be known.
    """

    def __init__(self, batches, optimizer, scheduler, scores):
        self.batches, self.optimizer, self.scheduler = batches, optimizer, scheduler
        self.learning_rate = scheduler.get_last_lr()[0]
        self.scores, self.arrival = torch.stack(scores), None
        if self.scores.is_cuda:
            pinned = torch.empty_like(self.scores, device="cpu", pin_memory=True)
            self.scores = pinned.copy_(self.scores, non_blocking=True)
            self.arrival = torch.cuda.current_stream().record_event()

    def settled(self):
        """The Step, whose scores are waited for. If it was applied, the schedule moves; if not, no count has moved."""
        if self.arrival:
            self.arrival.synchronize()
        loss, norm, tokens, found_inf, *wishes = self.scores.tolist()
        if found_inf:
            self.optimizer.take_back()
        else:
            self.scheduler.step()
        return Step(self.batches, self.learning_rate, loss, norm, int(tokens), not found_inf, wishes)


def gradient_norm(parameters):
    """The length of all gradients together, a float32 tensor: in their own bfloat16 it would have three digits.

    A CPU takes a matrix part by part. As a whole torch would copy it to float32, and add it up in one such number,
    which is 1% off after 100 million squares.
    """
    parts = []
    for grad in (p.grad for p in parameters if p.grad is not None):
        is_whole = grad.device.type != "cpu" or isinstance(grad, DTensor)
        parts += [grad] if is_whole else grad.view(-1).split(CPU_PART)
    norms = torch._foreach_norm(parts, dtype=torch.float32)  # on a card a few kernels, in place of one for each part
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def build_optimizer(model, learning_rate, weight_decay, betas):
    """AdamW over the parameters that need gradients; norms and biases don't decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, learning_rate, betas, weight_decay)


def build_scheduler(optimizer, name, warmup_steps, steps):
    """Gives each of `steps` optimizer steps its share of the learning rate; `name` is as in `rate_share`."""
    return LambdaLR(optimizer, lambda done: rate_share(name, done + 1, warmup_steps, steps))


def rate_share(name, step, warmup_steps, steps):
    """The share of the learning rate that a step, counted from 1, is taken with.

    It rises to 1 in step `warmup_steps`; without warmup the first step has it all. From there it is "constant", or
    falls in a line ("linear") or half a wave ("cosine") that would come to 0 one step after the last.
    """
    peak = max(warmup_steps, 1)
    if step <= peak:
        return step / peak
    fallen = (step - peak) / (steps + 1 - peak)
    return {"constant": 1.0, "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}[name]
