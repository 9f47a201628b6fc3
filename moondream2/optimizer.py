"""AdamW that loses nothing to bfloat16, and the schedule of its rate.

A bfloat16 weight has 8 significant bits: an update of 3e-5 to a weight of 0.02 mostly rounds away. But it is also the
upper half of a float32 number. So the bits behind it are kept beside it, 8 for a matrix and all 16 for a vector (norms,
whose weights are near 1, need them), and each step computes on the whole number. Of a matrix's weight of 0.02 a step of
2.4e-7 still counts. A matrix's first moment, whose size the second one bounds, has 8 bits: so a matrix takes no more
than in bfloat16 throughout. It and the second one are rounded up or down in turn, to be right over steps (see
`narrow`).

Bytes for weight, gradient and moments, and the mean training loss in steps 141 to 160 of two layers of the text model
at width 1024 (64 random sequences of 48 tokens to learn, vocabulary 4096, batch 8):

| AdamW                                   | bytes a   | loss at rate 3e-5, | loss at rate 3e-5,  | at rate 1e-5, |
|                                         | parameter | betas (0.9, 0.999) | betas (0.9, 0.99)   | (0.9, 0.99)   |
| --------------------------------------- | --------- | ------------------ | ------------------- | ------------- |
| float32, torch                          | 16        | 0.9692             | 1.0019              | 5.3875        |
| bfloat16 and the bits behind it, this   | 8         | 0.9617             | 0.9949              | 5.3909        |
| bfloat16, Kahan sums (torch-optimi)     | 10        |                    | 0.9933              | 5.3899        |
| bfloat16, torch                         | 8         |                    | 5.9279              |               |

Stochastic rounding (torchao) was as good at 8 bytes, but needs torch.compile on every device, and random
numbers in each checkpoint.
"""

import math
from functools import cache

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import get_scheduler

CPU_PART, GPU_PART = 1 << 19, 1 << 24  # elements updated at a time, so that what it takes on the way is small
GOLDEN = (math.sqrt(5) - 1) / 2
LEAST_DECAY = 2.0**-14  # a factor closer to 1 than this may round away


class AdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101), computed in float32 whatever the weights' type.

    The state of a parameter has its two moments, of its own type, and, for a bfloat16 one, `low`: the bits behind it.
    The first moment of a bfloat16 matrix is what `narrow` makes of it.
    """

    def __init__(self, params, lr, betas, weight_decay, eps=1e-8):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "step": 0, "owed": 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], 0.0
            group["step"] += 1
            group["owed"] += lr * group["weight_decay"]
            if group["owed"] > LEAST_DECAY:  # saved up until it acts
                decay, group["owed"] = group["owed"], 0.0
            correction1, correction2 = (1 - beta ** group["step"] for beta in (beta1, beta2))
            offset = group["step"] * GOLDEN % 1
            numbers = torch.tensor([1 - decay, lr / correction1, 1 / math.sqrt(correction2), offset])
            vectors = []
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state_of(p)
                    tensors = p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], state.get("low")
                    tensors = [local(each) for each in tensors if each is not None]
                    numbers = numbers.to(tensors[0].device)
                    if p.dim() > 1:
                        apply(tensors, numbers, beta1, beta2, group["eps"])
                    else:
                        vectors.append(tensors)
            if vectors:
                apply_together(vectors, numbers, beta1, beta2, group["eps"])

    def state_of(self, p):
        state = self.state[p]
        if not state:
            is_narrow = p.dtype == torch.bfloat16
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.int8 if is_narrow and p.dim() > 1 else p.dtype)
            state["exp_avg_sq"] = torch.zeros_like(p)
            if is_narrow:  # int32 where int16 would do: processes can't exchange int16
                state["low"] = torch.zeros_like(p, dtype=torch.int8 if p.dim() > 1 else torch.int32)
        return state

    def load_state_dict(self, state_dict):
        """As torch does it, but for its bringing each state to its weight's type: the whole numbers here are bits."""
        super().load_state_dict({**state_dict, "state": {}})
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            if i in state_dict["state"]:
                self.state[p] = {name: each.to(p.device) for name, each in state_dict["state"][i].items()}


def local(tensor):
    """This process's part of a sharded tensor, flat."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def apply(tensors, *numbers):
    """`update` on flat tensors, part by part; on a GPU as one kernel."""
    part = CPU_PART if tensors[0].device.type == "cpu" else GPU_PART
    function = fused() if tensors[0].is_cuda else update
    for parts in zip(*(tensor.split(part) for tensor in tensors), strict=True):
        function(*parts, numbers=numbers)


def apply_together(vectors, *numbers):
    """`apply` on many small ones as on one: calling a GPU for each would take longer than its work."""
    columns = list(zip(*vectors, strict=True))
    whole = [torch.cat(column) for column in columns]
    apply(whole, *numbers)
    sizes = [len(each) for each in columns[0]]
    for column, each in zip(columns, whole, strict=True):
        torch._foreach_copy_(column, each.split(sizes))


@cache
def fused():
    """`update` compiled into one kernel; where there is no C compiler to do that it runs as it stands, and slower."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(update, dynamic=True)


def update(weight, grad, mean, square, low=None, *, numbers):
    """One step of AdamW, in place.

    `numbers` are (kept share of the weight, rate, 1 / root of the bias correction, offset of `narrow`), betas, epsilon.
    """
    (keep, rate, correction, offset), beta1, beta2, eps = numbers
    whole, grad, square32 = weight if low is None else join(weight, low), grad.float(), square.float()
    is_narrow, most = mean.dtype == torch.int8, largest_ratio(beta1, beta2)
    mean32 = (widen(mean, square32.sqrt(), most) if is_narrow else mean.float()).lerp_(grad, 1 - beta1)
    square32.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square32.sqrt().add_(1e-30)
    square.copy_(square32 if low is None else to_bfloat16(square32, offset))
    mean.copy_(narrow(mean32, root, most, offset) if is_narrow else mean32)
    whole.mul_(keep).sub_(root.mul_(correction).add_(eps).reciprocal_().mul_(mean32).mul_(rate))
    if low is not None:
        split(whole, weight, low)


def largest_ratio(beta1, beta2):
    """What |mean| / sqrt(square) can't exceed, by Cauchy-Schwarz, if beta1**2 <= 0.99 * beta2, as in any use."""
    return (1 - beta1) / math.sqrt((1 - beta2) * max(1 - beta1**2 / beta2, 0.01))


def narrow(mean, root, most, offset):
    """The mean in 8 bits: the square root of its share of the largest it can be, which has the finest steps near 0.

    What lies between two steps goes to the larger one if its fraction and `offset` reach 1. The offset moves by the
    golden ratio, which visits [0, 1) evenly: so the mean is right over steps, and a small one decays to 0, where
    rounding to the nearest would leave it as it is for good. Returned are float32 numbers; a copy to int8 leaves their
    fractions out.
    """
    size = mean.abs().div_(root).mul_(127**2 / most).sqrt_().add_(offset).clamp_(max=127)
    return size.copysign_(mean)


def to_bfloat16(square, offset):
    """The mean of squares, rounded up if what is cut off and `offset` reach 1, as in `narrow`.

    Rounded to the nearest it would stand still long before it has come near the squares of new gradients.
    """
    bits = square.view(torch.int32) + (offset * 2**16).int()
    return bits.bitwise_and_(-1 << 16).view(torch.float32)


def widen(narrowed, root, most):
    """The float32 numbers that `narrow` stored."""
    size = narrowed.float()
    return size.mul_(size.abs()).mul_(root).mul_(most / 127**2)


def join(weight, low):
    """The float32 numbers of which `weight` holds the upper 16 bits and `low`, signed, those behind them."""
    return weight.float().view(torch.int32).add_(low, alpha=1 << unused_bits(low)).view(torch.float32)


def split(whole, weight, low):
    """Rounds float32 numbers, in place, and splits them: weight gets the nearest bfloat16, low what that leaves."""
    bits, unused = whole.view(torch.int32), unused_bits(low)
    if unused:
        bits.add_(1 << unused - 1).bitwise_and_(-1 << unused)
    high = bits.add(1 << 15).bitwise_and_(-1 << 16)
    weight.copy_(high.view(torch.float32))
    low.copy_((bits - high).bitwise_right_shift_(unused))


def unused_bits(low):
    return 8 if low.dtype == torch.int8 else 0


def build_optimizer(model, learning_rate, weight_decay, betas):
    """AdamW over the parameters that need gradients; norms and biases don't decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, learning_rate, betas, weight_decay)


def build_scheduler(optimizer, name, warmup_steps, steps):
    """transformers' schedule of that name over optimizer steps, rising from 0 over the first `warmup_steps`."""
    name = "constant_with_warmup" if name == "constant" and warmup_steps else name
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
