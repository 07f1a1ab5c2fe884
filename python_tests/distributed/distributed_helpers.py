"""What the distributed checks share: models, data, training, comparisons."""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import afa_kernels as afa

ROWS, FEATURES, HIDDEN, STEPS = 8, 16, 24, 5


class Mlp(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.gate_proj = nn.Linear(FEATURES, HIDDEN, bias)
        self.up_proj = nn.Linear(FEATURES, HIDDEN, bias)
        self.down_proj = nn.Linear(HIDDEN, FEATURES, bias)

    def forward(self, x):
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def model(**options) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(Mlp(), Mlp(bias=False))
    afa.inject(made, r=4, **options)
    for p in made.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.15)
    return made


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(ROWS, FEATURES), torch.randn(ROWS, FEATURES)


def mine(t: torch.Tensor) -> torch.Tensor:
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def train(made, x, target, steps=STEPS) -> afa.AnnealSchedule:
    """SGD, so that a factor in a gradient shows in the weights."""
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    schedule = afa.AnnealSchedule(steps, end_frac=0.8).attach(made)
    for _ in range(steps):
        nn.functional.mse_loss(made(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        with CommDebugMode() as communication:
            schedule.step()
        assert communication.get_total_counts() == 0
    return schedule


def full(t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_close(got, want, allowed: float, what: str) -> None:
    error = (got - want).norm() / want.norm()
    assert error <= allowed, (what, error)


def assert_parameters(got: nn.Module, want: nn.Module) -> None:
    wanted = dict(want.named_parameters())
    for name, p in got.named_parameters():
        torch.testing.assert_close(full(p), wanted[name].detach(), msg=lambda m, n=name: f"{n}: {m}")


def assert_alpha_is_the_same_everywhere(made: nn.Module) -> None:
    layers = [m for m in made.modules() if isinstance(m, afa.AFALinear)]
    own = torch.tensor([[m.alpha_t, m.alpha_t_buffer.item()] for m in layers])
    everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own)
    assert all(torch.equal(other, own) for other in everywhere)


def trained_alone(**options) -> nn.Module:
    alone = model(**options)
    before = copy.deepcopy(alone.state_dict())
    train(alone, *data())
    for name, p in alone.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    return alone


@contextlib.contextmanager
def expects(error: type[Exception], words: str):
    try:
        yield
    except error as raised:
        assert words in str(raised), raised
        return
    raise AssertionError(f"no {error.__name__} with {words!r}")
