"""Tensor parallelism in one process of the distributed tests: distributed_worker.py runs the checks."""

import copy
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_helpers import (
    FEATURES,
    HIDDEN,
    assert_alpha_is_the_same_everywhere,
    assert_close,
    assert_parameters,
    data,
    expects,
    full,
    model,
    train,
    trained_alone,
)
from layer_helpers import Conv1D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import afa_kernels as afa
from afa_kernels.layers.shared_input import on_shards
from afa_kernels.parallel import ColwiseAFA, RowwiseAFA


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


def check_tensor_parallel_under_autocast_and_sharing_inputs(_folder: Path) -> None:
    made, alone = tensor_parallel(model(share_inputs=True)), model()
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


class Collectives(TorchDispatchMode):
    """Counts them by name. CommDebugMode puts hooks on modules, from which each layer gets a view of x of its own."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if any(isinstance(a, DTensor) for a in tree_leaves((args, kwargs))):
            return NotImplemented  # it comes again as what its shards do
        if func.namespace == "_c10d_functional":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    """Projections of different widths on one x, as in grouped-query attention."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(FEATURES, HIDDEN)
        self.k_proj = nn.Linear(FEATURES, HIDDEN // 2, bias=False)
        self.v_proj = nn.Linear(FEATURES, HIDDEN // 2)
        self.o_proj = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x, between=None, context=None):
        q = self.q_proj(x)
        if between is not None:
            between(x)
        other = x if context is None else context
        return self.o_proj(q * (self.k_proj(other) * self.v_proj(other)).repeat_interleave(2, -1))


def attention(shared: bool, layouts: dict | None = None, **output) -> tuple[Attention, Attention]:
    """Return a block split over the processes, its layers sharing x or not, and the same block whole."""
    torch.manual_seed(4)
    alone = Attention()
    afa.inject(alone, r=4, share_inputs=False)
    for i, layer in enumerate(m for m in alone.modules() if isinstance(m, afa.AFALinear)):
        nn.init.normal_(layer.lora_b)
        layer.set_alpha_t(0.7 - 0.2 * i)
    made = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {name: ColwiseAFA(input_layouts=(layouts or {}).get(name)) for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(made, mesh, plan | {"o_proj": RowwiseAFA(**output)})
    return afa.share_inputs(made) if shared else made, alone


def gradients(made: Attention, whole: Attention, given, x, part=lambda t: t, **options) -> tuple[Counter, Counter]:
    """Compare a step of ``made`` on ``given``, this process's part of x, with the whole block's; return how often each
    collective ran in the forward and in the backward."""
    given, x = given.detach().requires_grad_(), x.detach().requires_grad_()
    torch.manual_seed(5)
    dy = torch.randn_like(x)
    with Collectives() as forward:
        y = made(given, **options)
    with Collectives() as backward:
        y.backward(part(dy))
    want = whole(x, **options)
    want.backward(dy)
    assert_close(y.detach(), part(want).detach(), 1e-6, "y")
    assert_close(full(given.grad), x.grad if isinstance(given, DTensor) else part(x.grad), 1e-6, "dx")
    for (name, p), q in zip(made.named_parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) != p.requires_grad, name
        if p.requires_grad:
            assert_close(full(p.grad), q.grad, 1e-6, name)
    return forward.counts, backward.counts


def check_tensor_parallel_shared_inputs_reduce_dx_once(_folder: Path) -> None:
    torch.manual_seed(6)
    x = torch.randn(3, 4, FEATURES)
    for shared, members in ((False, 3), (True, 1)):
        _, backward = gradients(*attention(shared), x, x)
        assert backward["all_reduce"] == members, (shared, backward)


def check_tensor_parallel_shared_inputs_gather_a_split_sequence_once(_folder: Path) -> None:
    def part(t: torch.Tensor) -> torch.Tensor:
        return t.chunk(2, 1)[dist.get_rank()]

    torch.manual_seed(6)
    x = torch.randn(3, 4, FEATURES)
    layouts = dict.fromkeys(("q_proj", "k_proj", "v_proj"), Shard(1))
    for shared, members in ((False, 3), (True, 1)):
        blocks = attention(shared, layouts, output_layouts=Shard(1))
        forward, backward = gradients(*blocks, part(x), x, part)
        assert forward["all_gather_into_tensor"] == members, (shared, forward)
        # o_proj, too, scatters: z in the forward.
        assert backward["reduce_scatter_tensor"] == members, (shared, backward)


def check_tensor_parallel_shared_inputs_keep_to_what_is_shared(_folder: Path) -> None:
    """Members compute by themselves where x is not the same for all, or was written between them."""
    torch.manual_seed(6)
    x, other = torch.randn(3, 4, FEATURES), torch.randn(3, 4, FEATURES)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = attention(True)
    _, backward = gradients(*blocks, x, x, context=other)
    assert backward["all_reduce"] == 1, backward
    sharded = DTensor.from_local(x, mesh, [Replicate()])
    for given, write in ((x, Tensor.neg_), (sharded, Tensor.neg_), (sharded, lambda t: t.to_local().neg_())):
        made, whole = attention(True)
        with torch.no_grad():
            got, want = made(given.clone(), between=write), whole(x.clone(), between=Tensor.neg_)
        assert_close(got, want, 1e-6, "y of an x that was written")


def check_tensor_parallel_members_that_do_not_share(_folder: Path) -> None:
    def shared(**changed) -> bool:
        made, whole = attention(False)
        members = {"q_proj": made.q_proj, "k_proj": made.k_proj, "v_proj": made.v_proj}
        members |= {name: change(made, whole) for name, change in changed.items()}
        return on_shards(list(members.values()), torch.randn(3, 4, FEATURES)) is not None

    def merged(made, _whole):
        made.v_proj.set_alpha_t(0.0)
        made.v_proj.merge()
        return made.v_proj

    def hooked(made, _whole):
        made.v_proj.register_forward_pre_hook(lambda *_: None)
        return made.v_proj

    assert shared()
    assert not shared(k_proj=lambda *_: attention(False, {"k_proj": Shard(1)})[0].k_proj), "another input layout"
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rowwise = [parallelize_module(afa.AFALinear(nn.Linear(8, 8), r=4), mesh, RowwiseAFA()) for _ in range(2)]
    assert on_shards(rowwise, torch.randn(3, 4)) is None, "split over their inputs"
    assert not shared(q_proj=lambda _, whole: whole.q_proj) and not shared(v_proj=lambda _, whole: whole.v_proj), (
        "whole"
    )
    assert not shared(v_proj=merged) and not shared(v_proj=hooked)


def check_tensor_parallel_shared_inputs_of_a_dtensor(_folder: Path) -> None:
    torch.manual_seed(6)
    x = torch.randn(3, 4, FEATURES)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made, whole = attention(True)
    _, backward = gradients(made, whole, DTensor.from_local(x, mesh, [Replicate()]), x)
    assert backward["all_reduce"] == 1, backward
    afa.unshare_inputs(made)
    layers = [made.q_proj, made.k_proj, made.v_proj]
    ys = afa.AFASharedInput(layers)(x.requires_grad_())
    for y, layer in zip(ys, layers, strict=True):
        assert torch.equal(y, layer(x))
    with Collectives() as backward:
        sum(y.sum() for y in ys).backward()
    assert backward.counts["all_reduce"] == 1, backward.counts
