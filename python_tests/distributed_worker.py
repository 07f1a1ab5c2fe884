"""One process of the distributed tests: torchrun starts two of it, over gloo on the CPU.

Every function called ``check_*`` is one test; test_distributed.py reads what came of each.
"""

import contextlib
import copy
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layer_helpers import Conv1D
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import afa_kernels as afa
from afa_kernels.parallel import ColwiseAFA, RowwiseAFA

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


def check_ddp(_folder: Path) -> None:
    for group in (False, True):
        made = model(group=group)
        train(DistributedDataParallel(made), *map(mine, data()))
        assert_parameters(made, trained_alone())
        assert_alpha_is_the_same_everywhere(made)


def check_ddp_alpha_is_resumed_alike(_folder: Path) -> None:
    made = model()
    schedule = train(made, *data(), steps=3)
    assert schedule.alpha_t == 0.0
    fresh, again = model(), afa.AnnealSchedule(3, end_frac=0.8)
    again.attach(fresh)
    again.load_state_dict(schedule.state_dict())
    assert_alpha_is_the_same_everywhere(fresh)


def sharded(**options) -> nn.Module:
    made = model(**options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in made:
        fully_shard(block, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def check_fsdp2(_folder: Path) -> None:
    for group in (False, True):
        made = sharded(group=group)
        assert isinstance(made[0].up_proj.lora_a, DTensor)
        train(made, *map(mine, data()))
        assert_parameters(made, trained_alone())
        assert_alpha_is_the_same_everywhere(made)


def check_fsdp2_around_single_layers(_folder: Path) -> None:
    """Siblings in a group are sharded while one of them computes: the group has to stand back."""
    made = model(group=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in made:
        for layer in block.children():
            fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    train(made, *map(mine, data()))
    assert_parameters(made, trained_alone())


def check_fsdp2_with_a_16_bit_base(_folder: Path) -> None:
    def make():
        made = model()
        for m in made.modules():
            if isinstance(m, nn.Linear):
                m.to(torch.bfloat16)
        return made

    alone, made = make(), make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in made:
        fully_shard(block, mesh=mesh)
    fully_shard(made, mesh=mesh)
    x, target = (t.bfloat16() for t in data())
    for m, inputs in ((alone, (x, target)), (made, (mine(x), mine(target)))):
        nn.functional.mse_loss(m(inputs[0]), inputs[1]).backward()
    for (name, got), want in zip(made.named_parameters(), alone.parameters(), strict=True):
        if want.grad is not None:
            assert got.grad.dtype == torch.float32, name
            assert_close(full(got.grad), want.grad, 0.02, name)


def check_fsdp2_adapters_are_saved_whole_and_loaded_in_parts(folder: Path) -> None:
    made = sharded()
    train(made, *map(mine, data()))
    afa.save_adapter(made, folder / "adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    alone, others = model(), sharded()
    afa.load_adapter(alone, folder / "adapter")
    afa.load_adapter(others, folder / "adapter")
    assert_parameters(made, alone)
    assert_parameters(others, alone)
    assert all(m.alpha_t == 0.0 for m in others.modules() if isinstance(m, afa.AFALinear))


def check_fsdp2_sharded_checkpoint(folder: Path) -> None:
    made = sharded()
    afa.set_alpha_t(made, 0.25)
    dcp.save({"model": get_model_state_dict(made)}, checkpoint_id=folder / "dcp")
    other = sharded()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state["model"])
    assert_parameters(other, model())
    assert all(m.alpha_t == 0.25 for m in other.modules() if isinstance(m, afa.AFALinear))
    x, _ = data()
    torch.testing.assert_close(other(x), made(x))


def tensor_parallel(made: nn.Module, **output) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {}
    for name in ("0", "1"):
        plan[f"{name}.gate_proj"] = ColwiseAFA()
        plan[f"{name}.up_proj"] = ColwiseAFA()
        plan[f"{name}.down_proj"] = RowwiseAFA(**output)
    return parallelize_module(made, mesh, plan)


def check_tensor_parallel_is_the_whole_model(_folder: Path) -> None:
    for alpha_t in (0.7, 0.0):
        for dtype in (torch.float32, torch.bfloat16):
            made, alone = model(), model()
            for m in (made, alone):
                afa.set_alpha_t(m, alpha_t)
                m.to(dtype)
            tensor_parallel(made)
            assert made[0].up_proj.lora_b.to_local().shape == (HIDDEN // 2, 4)
            assert made[0].down_proj.lora_b.to_local().shape == (FEATURES, 2)
            x = data()[0].to(dtype)
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            ys = [m(t) for m, t in zip((made, alone), inputs, strict=True)]
            allowed = 1e-5 if dtype == torch.float32 else 0.02
            assert_close(*ys, allowed, "y")
            for y in ys:
                y.float().square().mean().backward()
            assert_close(inputs[0].grad, inputs[1].grad, allowed, "dx")
            for (name, got), want in zip(made.named_parameters(), alone.parameters(), strict=True):
                assert (got.grad is None) == (want.grad is None), name
                if want.grad is not None:
                    assert_close(full(got.grad), want.grad, allowed, name)


def check_tensor_parallel_trains_merges_and_is_saved(folder: Path) -> None:
    made, alone = tensor_parallel(model()), trained_alone()
    x, target = data()
    train(made, x, target)
    assert_parameters(made, alone)
    assert_alpha_is_the_same_everywhere(made)
    afa.save_adapter(made, folder / "tp")
    loaded = afa.load_adapter(model(), folder / "tp")
    assert_parameters(loaded, alone)
    others = afa.load_adapter(tensor_parallel(model()), folder / "tp")
    assert_parameters(others, alone)
    want = made(x).detach()
    afa.merge(made)
    torch.testing.assert_close(made(x).detach(), want)
    afa.unmerge(made)
    torch.testing.assert_close(made(x).detach(), want)
    with expects(ValueError, "0.gate_proj is sharded"):
        afa.unload(made)


def check_tensor_parallel_under_autocast_and_in_groups(_folder: Path) -> None:
    made, alone = tensor_parallel(model(group=True)), model()
    x, _ = data()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(made(x), alone(x), 0.02, "y")


def check_tensor_parallel_over_the_sequence(_folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made, alone = model()[0].down_proj, model()[0].down_proj
    parallelize_module(made, mesh, RowwiseAFA(output_layouts=Shard(1)))
    torch.manual_seed(2)
    x = torch.randn(3, 4, HIDDEN)
    got = made(x.chunk(2, -1)[dist.get_rank()])
    torch.testing.assert_close(got, alone(x).chunk(2, 1)[dist.get_rank()])
    up = model()[0].up_proj
    whole = copy.deepcopy(up)
    parallelize_module(up, mesh, ColwiseAFA(input_layouts=Shard(1), use_local_output=False))
    x = torch.randn(3, 4, FEATURES)
    y = up(x.chunk(2, 1)[dist.get_rank()])
    assert isinstance(y, DTensor)
    torch.testing.assert_close(y.full_tensor(), whole(x))


def check_tensor_parallel_of_conv1d(_folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(3)
    x = torch.randn(3, FEATURES)
    for style, inputs in ((ColwiseAFA, x), (RowwiseAFA, x.chunk(2, -1)[dist.get_rank()])):
        alone = afa.AFALinear(Conv1D(HIDDEN, FEATURES), r=4)
        nn.init.normal_(alone.lora_b)
        made = copy.deepcopy(alone)
        parallelize_module(made, mesh, style(use_local_output=False))
        torch.testing.assert_close(full(made(inputs)), alone(x).detach())


def check_tensor_parallel_refuses(_folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def apply(style, layer):
        parallelize_module(layer, mesh, style)

    def layer(k=8, n=8, **options):
        return afa.AFALinear(nn.Linear(k, n), **options)

    with expects(TypeError, "expected an AFALinear, got a Linear"):
        apply(ColwiseAFA(), nn.Linear(8, 8))
    with expects(ValueError, "expected dropout=0, got 0.1"):
        apply(ColwiseAFA(), layer(dropout=0.1))
    with expects(ValueError, "out_features=7 cannot be split evenly among 2 processes"):
        apply(ColwiseAFA(), layer(n=7))
    with expects(ValueError, "in_features=7 cannot be split"):
        apply(RowwiseAFA(), layer(k=7))
    with expects(ValueError, "r=3 cannot be split"):
        apply(RowwiseAFA(), layer(r=3))
    with expects(ValueError, "neither merged nor sharded"):
        merged = layer()
        merged.set_alpha_t(0.0)
        merged.merge()
        apply(ColwiseAFA(), merged)


@contextlib.contextmanager
def expects(error: type[Exception], words: str):
    try:
        yield
    except error as raised:
        assert words in str(raised), raised
        return
    raise AssertionError(f"no {error.__name__} with {words!r}")


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name in names:
        failure = ""
        try:
            globals()[name](folder)
        except Exception:
            failure = traceback.format_exc()
        # A failure of one process is one of all: otherwise they would wait for it for ever.
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        results[name] = "\n".join(f for f in failures if f)
    if dist.get_rank() == 0:
        Path(folder / "results.json").write_text(json.dumps(results))


CHECKS = [name for name in list(globals()) if name.startswith("check_")]

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or CHECKS)
    # The process groups are not destroyed: gloo's threads need no orderly end, and torch may wait for one, as torch 2.6
    # does for the groups of a device mesh and torch's exit handlers for those that are left.
    sys.stdout.flush()
    os._exit(0)
