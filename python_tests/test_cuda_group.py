"""Layers that share x, as kernels of the CUDA backend: one launch for each pass, whatever the members are like."""

import re

import pytest
import torch
from conftest import skip_unless_available
from helpers import assert_as_accurate_as_torch, eager, poisoned_memory
from test_cuda_weights import held

from afa_kernels.activation import IDENTITY
from afa_kernels.backend import cuda, registry
from afa_kernels.backend.registry import Call, Member
from afa_kernels.options import Spec

NAMES = [name for name in ("cuda_emulated", "cuda_ptx") if name in registry.names()]
# The N and ranks of the members, and K: q, k and v; gate and up; odd ranks, edges of every tile; the largest.
GROUPS = {
    "q, k, v": (136, (264, 72, 72), (16, 16, 16)),
    "gate, up": (264, (520, 520), (8, 8)),
    "odd": (904, (136, 264, 8), (1, 17, 5)),
    "wide": (456, (8, 392, 600), (32, 31, 32)),
    "alone": (136, (264,), (16,)),
}
ROWS = (1, 75, 200)


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available("cuda_emulated")


class Group:
    """Members with weights of their own dtype and strides, and the gradients of their outputs."""

    layouts = ("dense", "transposed", "misaligned")

    def __init__(self, m: int, k: int, widths, ranks, dtype=torch.bfloat16, *, float_weights: bool | None = None):
        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

        self.x = draw(m, k)
        self.members, self.bases, self.dys = [], [], []
        for i, (n, r) in enumerate(zip(widths, ranks, strict=True)):
            a, b = draw(r, k, scale=k**-0.5), draw(n, r, scale=r**-0.5)
            if float_weights or (float_weights is None and i != 1):  # mixed by default
                a, b = held(a, self.layouts[i]), held(b, self.layouts[i])
            activation = ("silu", "gelu", IDENTITY)[i]
            alpha_t = None if activation == IDENTITY else torch.tensor((0.3, 0.8)[i])
            self.members.append(Member(a, b, alpha_t, Spec(activation, 1.5 - i, 0)))
            self.bases.append((None, draw(1, n).expand(m, n), draw(m, n))[i])
            self.dys.append(draw(m, n))

    @staticmethod
    def of(name: str, m: int, **options) -> "Group":
        return Group(m, *GROUPS[name], **options)

    def need(self, what=True) -> list[bool]:
        return [what] * len(self.members)

    def forward(self, name="cuda_emulated", save_z=True):
        outs = [torch.full_like(dy, torch.nan) for dy in self.dys]
        zs = registry.get(name).group_forward(self.x, self.members, bases=self.bases, outs=outs, save_z=save_z)
        return outs, zs

    def backward(self, zs, name="cuda_emulated", *, need_dx=True, need_da=None, need_db=None):
        return registry.get(name).group_backward(
            self.dys, self.x, self.members, zs, need_dx=need_dx,
            need_da=need_da or self.need(), need_db=need_db or self.need(),
        )  # fmt: skip

    def alone(self, i: int, name="cuda_emulated"):
        """Return y, z, dx, da and db of member i."""
        member, backend, y = self.members[i], registry.get(name), torch.empty_like(self.dys[i])
        a, b, alpha_t, spec = member
        z = backend.forward(self.x, a, b, alpha_t, None, spec, base=self.bases[i], out=y, save_z=True)
        needs = {"need_dx": True, "need_da": True, "need_db": True}
        return y, z, *backend.backward(self.dys[i], self.x, a, b, z, alpha_t, None, spec, **needs)

    def plain(self, dtype: torch.dtype):
        """Return every y, dx, every da and every db in torch ops, all in ``dtype``."""
        x = self.x.to(dtype).requires_grad_()
        weights = [
            [w.to(self.x.dtype).to(dtype).contiguous().requires_grad_() for w in (member.a, member.b)]
            for member in self.members
        ]
        ys = []
        for (a, b), (_, _, alpha_t, spec), base in zip(weights, self.members, self.bases, strict=True):
            alpha_t, name = (0.0, "silu") if alpha_t is None else (alpha_t.item(), spec.activation)
            base = None if base is None else base.to(dtype)
            ys.append(eager(x, a, b, alpha_t, activation=name, scaling=spec.scaling, base=base))
        torch.autograd.backward(ys, [dy.to(dtype) for dy in self.dys])
        return [y.detach() for y in ys], [x.grad], [a.grad for a, _ in weights], [b.grad for _, b in weights]


def flat(results) -> list[torch.Tensor]:
    first, *lists = results
    return [first, *(t for some in lists for t in some if t is not None)]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(left), flat(right), strict=True))


@pytest.mark.parametrize("float_weights", [None, True, False], ids=["mixed", "f32", "x's dtype"])
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("which", GROUPS)
@pytest.mark.parametrize("name", NAMES)
def test_a_group_against_float64(name, which, m, float_weights):
    if name == "cuda_ptx" and (m, float_weights) not in ((75, None), (200, True)):
        pytest.skip("some suffice")
    group = Group.of(which, m, float_weights=float_weights)
    with poisoned_memory():
        ys, zs = group.forward(name)
        dx, das, dbs = group.backward(zs, name)
    truth, torch_ops = group.plain(torch.float64), group.plain(group.x.dtype)
    got = (ys, [dx], das, dbs)
    for what, some, exact, yardstick in zip(("y", "dx", "da", "db"), got, truth, torch_ops, strict=True):
        for i, tensor in enumerate(some):
            weight = {"da": group.members[i].a, "db": group.members[i].b}.get(what, group.x)
            assert tensor.dtype == weight.dtype
            assert_as_accurate_as_torch(
                tensor.to(yardstick[i].dtype), yardstick[i], exact[i], f"{what}[{i}]", group.x.dtype
            )


@pytest.mark.parametrize("m", (*ROWS, 6200))
@pytest.mark.parametrize("which", GROUPS)
def test_a_member_has_the_bits_that_it_has_alone(which, m):
    """z and y, given z; dB where both cut the rows into equal chunks."""
    if m > 1000 and which != "q, k, v":
        pytest.skip("one pass over many rows, once")
    group = Group.of(which, m)
    ys, zs = group.forward()
    for i, (y, z) in enumerate(zip(ys, zs, strict=True)):
        alone = group.alone(i)
        assert torch.equal(z, alone[1]) and torch.equal(y, alone[0]), i


@pytest.mark.parametrize("which", ["q, k, v", "odd"])
def test_recomputed_z_gives_the_same_bits(which):
    group = Group.of(which, 75)
    _, zs = group.forward()
    assert group.forward(save_z=False)[1] is None
    assert same(group.backward(zs), group.backward(None))


@pytest.mark.parametrize("need_dx", [False, True])
@pytest.mark.parametrize("need_da", [(1, 0, 1), (0, 0, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("need_db", [(1, 1, 1), (0, 0, 1), (0, 0, 0)], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_needed(need_dx, need_da, need_db):
    group = Group.of("odd", 75)
    _, zs = group.forward()
    dx, das, dbs = group.backward(zs)
    need_da, need_db = [bool(n) for n in need_da], [bool(n) for n in need_db]
    with poisoned_memory():
        got = group.backward(zs, need_dx=need_dx, need_da=need_da, need_db=need_db)
    assert (got[0] is not None) == need_dx and (not need_dx or torch.equal(got[0], dx))
    for some, every, need in ((got[1], das, need_da), (got[2], dbs, need_db)):
        assert [t is not None for t in some] == need
        assert all(torch.equal(t, full) for t, full in zip(some, every, strict=True) if t is not None)


@pytest.mark.parametrize("name", NAMES)
def test_schedules_give_the_same_bits(name):
    native = registry.get(name).group_forward.__self__._module if name == "cuda_ptx" else cuda._emulator_module()[0]
    group = Group.of("wide", 130)
    results = []
    for seed in range(3):
        if name == "cuda_ptx":
            native.set_seed(1000 * seed)
        else:
            native.set_options(("random", "warp_priority", "descending")[seed], seed)
        ys, zs = group.forward(name)
        results.append([ys[0], [*ys, *zs], *group.backward(zs, name)[1:]])
    if name != "cuda_ptx":
        native.set_options("random", 1)
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "m, expected",
    [(75, ["project", "expand", "dy", "reduce", "x", "reduce"]), (6200, ["forward", "dy", "reduce", "x", "reduce"])],
)
def test_a_group_launches_what_a_lone_layer_does(m, expected):
    if "cuda_ptx" not in NAMES:
        pytest.skip("built with nvcc only")
    from afa_kernels import _cuda_on_ptx

    k, widths = (904, (264, 72, 72)) if m < 1000 else (16, (16, 8, 8))
    group = Group(m, k, widths, (16, 8, 5), float_weights=True)
    _cuda_on_ptx.take_launches()
    _, zs = group.forward("cuda_ptx")
    group.backward(zs, "cuda_ptx")
    kernels = [launch["kernel"].partition("_kernelI")[0] for launch in _cuda_on_ptx.take_launches()]
    assert [kernel.removeprefix("_ZN3afa").lstrip("0123456789") for kernel in kernels] == expected


def test_x_is_read_once_for_all_members():
    from afa_kernels import _emulator

    m, k, widths, ranks = 128, 512, (256, 64, 64), (16, 16, 16)
    group = Group(m, k, widths, ranks, float_weights=False)
    _emulator.reset_counters()
    _, zs = group.forward()
    weights = 2 * sum(r * (k + n) for n, r in zip(widths, ranks, strict=True))
    assert _emulator.counters()["async_copy_bytes"] == 2 * m * k + 2 * weights  # two tiles of rows read A and B
    _emulator.reset_counters()
    group.backward(zs)
    slabs = k // 128  # of the x pass, each of which reads dz
    expected = 2 * m * (k + sum(widths)) + slabs * 2 * m * 64 + weights
    assert _emulator.counters()["async_copy_bytes"] == expected


@pytest.mark.parametrize("calls, reason", [((16,) * 4, "up to 3 layers"), ((16, 33), "ranks up to 32 .* got 33")])
def test_refusals_say_why(calls, reason):
    calls = [Call("cpu", torch.bfloat16, 64, 64, 64, r, "silu") for r in calls]
    for name in NAMES:
        assert re.search(reason, registry.get(name).refuses_group(calls))
        assert registry.get(name).refuses_group([calls[0]] * 3) is None


def test_limits_are_those_of_the_kernels():
    module = cuda._emulator_module()[0]
    assert (module.MAX_MEMBERS, module.MAX_MEMBER_RANK) == (cuda._MAX_MEMBERS, cuda._MAX_MEMBER_RANK)
    with pytest.raises(ValueError, match="layers that share x have ranks up to 32: M=64, K=64, N=64,64, r=16,33"):
        module.launch_plan((64, 64, (64, 64), (16, 33)), 132, 227 << 10, 228 << 10)


@pytest.mark.parametrize("r", [8, 16, 32])
def test_scratch_memory_stays_small(r):
    module = cuda._emulator_module()[0]
    for k, widths in ((4096, (4096, 1024, 1024)), (4096, (4096,) * 3), (4096, (14336,) * 2), (8192, (28672,) * 2)):
        for m in (1, 1024, 8192, 131072):
            sizes = (m, k, widths, (r,) * len(widths))
            bound = max(64 << 20, (k + sum(widths)) * m * 2 // 50)
            assert module.forward_workspace(sizes) <= bound, sizes
            assert module.backward_workspace(sizes, True) <= bound, sizes
