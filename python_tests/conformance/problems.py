"""Random calls of a backend, each drawn from a number, and the same calls in torch ops.

A problem is of one of four kinds: one branch on all rows (``lone``), a branch for the rows of each owner (``owners``),
with the frozen matrix of each or of several in a row (``experts``), and layers that share x (``shared``). Operands have
any strides, with NaN between what belongs to them; where ranks differ from owner to owner, with NaN beyond them; and so
have rows that no owner has.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from helpers import DTYPES, ORDERS, assert_accurate, eager, mask_and_p, packed, poisoned_memory
from torch import Tensor

from afa_kernels.backend.interface import Backend, Member, Rows
from afa_kernels.operator.activation import ACTIVATIONS, IDENTITY
from conformance.layouts import LAYOUTS, OF_OWNERS, around, bits, memory_of, placed
from conformance.operands import Output, normal, output, random_rows

KINDS = ("lone", "owners", "experts", "shared")
SEEDS = (77, 0, -1, 2**63 - 1, -(2**63), 123456789012345)  # of dropout


@dataclass
class Problem:
    kind: str
    x: Tensor
    outputs: list[Output]
    rows: Rows | None = None
    tf32: bool = False
    number: int = 0
    dropout_seed: int = SEEDS[0]
    title: str = ""
    weight: Tensor | None = None  # of experts, (E, N, K), or (N, K) for all
    bias: Tensor | None = None  # (E, N), or (N,) for all

    def __str__(self) -> str:
        shapes = "; ".join(
            f"N={o.dy.shape[1]} r={o.a.shape[-2]} of {o.a.dtype} {o.spec} base={o.base is not None}"
            for o in self.outputs
        )
        return f"{self.title}: {self.kind} {self.x.dtype} {tuple(self.x.shape)} {shapes} {self.rows or ''}"

    @classmethod
    def random(cls, where, kind: str, number: int, *, dropout: bool | None = None) -> "Problem":
        """Return the problem of a number for a target (targets.py), with or without dropout where that is given."""
        draw = random.Random(f"{kind} {number}")
        torch.manual_seed(number)
        name = where.dtypes[number % len(where.dtypes)]
        dtype = DTYPES["f32" if name == "tf32" else name]
        rank, m, k = where.rank(draw, number), where.rows(draw), where.width(draw)
        masked = kind != "shared" and (number % 3 == 0 if dropout is None else dropout)
        if masked and not where.takes(dtype, rank, True):
            rank = min(rank, where.rank_classes[0])
        layouts = ["packed", *where.layouts(dtype)]
        of_matrices = [name for name in layouts if name in LAYOUTS]
        rows, ranks = None, [rank]
        if kind in ("owners", "experts"):
            rows = random_rows(draw, m, draw.choice(where.owners), rank)
        if kind == "shared":
            ranks = where.shared_ranks(draw, draw.choice((1, 2, 3)))
        names, outputs = [*sorted(ACTIVATIONS), IDENTITY], []
        for i, r in enumerate(ranks):
            of_weights = of_matrices if rows is None else layouts
            outputs.append(output(
                dtype, m, k, where.width(draw), r, rows,
                weights=draw.choice((dtype, torch.float32, *where.wide_weights)),
                dropout=draw.choice((13, 77, 230)) if masked else 0, activation=names[(number + i) % len(names)],
                alphas=[draw.choice((0.0, 0.3, 0.7, 1.0)) for _ in range(1 if draw.random() < 0.5 else 9)],
                scaling=draw.choice((0.5, 1.75, -2.0)),
                base="none" if kind == "experts" else draw.choice(("none", "matrix", "matrix", "row", "accumulated")),
                one_dy=draw.random() < 0.1,
                layouts=[draw.choice(names) for names in (of_weights, of_weights, *[of_matrices] * 3)],
            ))  # fmt: skip
        # Small enough that an activation is nearly linear, and so large that each branch of it is reached.
        scale = draw.choice((1.0, 1.0, 2.0, 1e-4 if dtype == torch.float32 else 1.0))
        x = placed(normal(dtype, m, k, scale=scale), draw.choice(of_matrices))
        title = f"problem {number} on {where.name}"
        problem = cls(kind, x, outputs, rows, name == "tf32", number, draw.choice(SEEDS), title)
        x[problem.behind()] = torch.nan
        if kind == "experts":
            problem._draw_weights(draw)
        return problem if where.device.type == "cpu" else problem.on(where.device)

    @classmethod
    def of(cls, dtype, m: int, k: int, widths, ranks, *, weights=None, **options) -> "Problem":
        """Return the call of one layer (``widths``, its N, and ``ranks`` are numbers), or of several that share x, with
        weights of several dtypes and layouts unless one is given."""
        x = normal(dtype, m, k)
        if isinstance(widths, int):
            return cls("lone", x, [output(dtype, m, k, widths, ranks, None, weights=weights or dtype, **options)])
        outputs = []
        for i, (n, r) in enumerate(zip(widths, ranks, strict=True)):
            own, layout = weights or (torch.float32, dtype)[i % 2], "packed"
            if weights is None:
                layout = ("packed", "columns apart", "rows at odd places")[i % 3]
            varied = {"activation": ("silu", "gelu", IDENTITY)[i % 3], "alphas": [(0.3, 0.8, 0.3)[i % 3]]}
            varied |= {"base": ("none", "row", "matrix")[i % 3], "layouts": [layout, layout, *["packed"] * 3]}
            outputs.append(output(dtype, m, k, n, r, None, weights=own, scaling=1.5 - i, **(varied | options)))
        return cls("shared", x, outputs)

    @classmethod
    def of_owners(cls, dtype, sizes, k: int, n: int, r: int, *, behind=0, ranks=None, weights=None, **options):
        """Return a call whose owners have so many rows each, with rows ``behind`` them that no owner has."""
        ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows = Rows(ends, None if ranks is None else torch.tensor(ranks, dtype=torch.int32), None)
        m = sum(sizes) + behind
        problem = cls("owners", normal(dtype, m, k), [], rows)
        problem.outputs = [output(dtype, m, k, n, r, rows, weights=weights or dtype, **options)]
        problem.x[problem.behind()] = torch.nan
        return problem

    def _draw_weights(self, draw) -> None:
        (o,), owners = self.outputs, len(self.rows.offsets)
        n, k, dtype = o.dy.shape[1], self.x.shape[1], self.x.dtype
        counts = [count for count in range(1, owners + 1) if owners % count == 0]
        leading = draw.choice([(), *((count,) for count in (owners, *counts))])
        transposed = draw.random() < 0.4  # as transformers keeps some models'
        shape = (*leading, k, n) if transposed else (*leading, n, k)
        layout = draw.choice(list(OF_OWNERS if leading else LAYOUTS))
        weight = placed(normal(dtype, *shape, scale=k**-0.5), layout)
        self.weight = weight.mT if transposed else weight
        if not leading:  # rows behind the last offset have that one matrix too
            behind = self.behind()
            self.x[behind], o.dy[behind] = (normal(dtype, *t[behind].shape) for t in (self.x, o.dy))
        bias = draw.choice(("none", "each", "one"))
        if bias != "none":
            self.bias = normal(dtype, *(leading if bias == "each" else ()), n)

    def on(self, device: torch.device) -> "Problem":
        """Return the same problem, in the same places of memory, on another device."""

        def there(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            return memory_of(t).to(device).as_strided(t.shape, t.stride(), t.storage_offset())

        tensors = ("a", "b", "alpha_t", "base", "dy")
        outputs = [replace(o, **{name: there(getattr(o, name)) for name in tensors}) for o in self.outputs]
        return replace(
            self, x=there(self.x), outputs=outputs, rows=None if self.rows is None else Rows(*map(there, self.rows)),
            weight=there(self.weight), bias=there(self.bias),
        )  # fmt: skip

    # --- whose rows are whose

    def behind(self) -> slice:
        """Return the rows that no owner has."""
        return slice(len(self.x) if self.rows is None else int(self.rows.offsets[-1]), len(self.x))

    def branches(self) -> Iterator[tuple[int, int, slice, Tensor, Tensor, float, float]]:
        """Yield each branch: its output, its owner (0 for a lone one), its rows, A and B of its rank, alpha_t and the
        scaling."""
        for i, o in enumerate(self.outputs):
            alphas = torch.zeros(1) if o.alpha_t is None else o.alpha_t.reshape(-1)
            if self.rows is None:
                yield i, 0, slice(len(self.x)), o.a, o.b, alphas[0].item(), o.spec.scaling
                continue
            offsets, ranks, scaling = self.rows
            start = 0
            for g, end in enumerate(offsets.tolist()):
                rank = o.a.shape[1] if ranks is None else int(ranks[g])
                own = o.spec.scaling if scaling is None else scaling[g].item()
                alpha_t = alphas[g if len(alphas) > 1 else 0].item()
                yield i, g, slice(start, end), o.a[g, :rank], o.b[g, :, :rank], alpha_t, own
                start = end

    # --- the call

    def run(self, backend: Backend, *, need: set[str] | None = None, dx: Tensor | None = None, save_z: bool = True):
        """Call both directions on poisoned memory, check that nothing is written but the results, and return these by
        name; of the gradients (all, or those in ``need``) those that are None too."""
        held = [self.x, *(t for o in self.outputs for t in (o.a, o.b, o.dy, o.alpha_t) if t is not None)]
        held += [t for t in self.rows or () if t is not None]
        held += [t for t in (*(o.base for o in self.outputs), self.weight, self.bias) if t is not None]
        before = [bits(memory_of(t)) for t in held]
        with poisoned_memory():
            results = self.forward(backend, save_z)
            if save_z:
                results |= self.backward(backend, results, need, dx)
        for t, old in zip(held, before, strict=True):
            assert torch.equal(bits(memory_of(t)), old), f"{self}: an operand of shape {tuple(t.shape)} was written"
        return results

    def forward(self, backend: Backend, save_z: bool = True) -> dict[str, Tensor]:
        if self.weight is not None:
            return self._linear_forward(backend, save_z)
        outs = [placed(o.base if o.accumulates else torch.full_like(o.dy, torch.nan), o.layout) for o in self.outputs]
        bases = [out if o.accumulates else o.base for o, out in zip(self.outputs, outs, strict=True)]
        before = [around(out) for out in outs]
        if self.kind == "shared":
            zs = backend.forward_shared(self.x, self.members(), bases=bases, outs=outs, save_z=save_z)
        else:
            (o,) = self.outputs
            call = (self.x, o.a, o.b, o.alpha_t, self.seed(), o.spec, self.rows)
            zs = backend.forward(*call, base=bases[0], out=outs[0], save_z=save_z)
            zs = [zs] if save_z else zs
        assert all(map(torch.equal, map(around, outs), before)), f"{self}: something beside y was written"
        assert save_z or zs is None
        named = [(f"y{i}", y) for i, y in enumerate(outs)] + [(f"z{i}", z) for i, z in enumerate(zs or ())]
        return dict(named)

    def _linear_forward(self, backend: Backend, save_z: bool) -> dict[str, Tensor]:
        (o,) = self.outputs
        call = (self.x, self.weight, self.bias, o.a, o.b, o.alpha_t, self.seed(), o.spec, self.rows)
        y, z = backend.linear_forward(*call, save_z=save_z)
        if self.weight.dim() == 3:
            y[self.behind()] = 0  # undefined
        return {"y0": y, "z0": z} if save_z else {"y0": y}

    def backward(self, backend: Backend, forward, need: set[str] | None = None, dx: Tensor | None = None):
        every = range(len(self.outputs))
        need = {"dx", *(f"{what}{i}" for what in ("da", "db") for i in every)} if need is None else need
        zs = [forward[f"z{i}"] for i in every]
        if self.kind == "shared":
            needs = {f"need_{what}": [f"{what}{i}" in need for i in every] for what in ("da", "db")}
            dys = [o.dy for o in self.outputs]
            needs |= {} if dx is None else {"dx": dx}
            dx, das, dbs = backend.backward_shared(dys, self.x, self.members(), zs, need_dx="dx" in need, **needs)
        else:
            (o,) = self.outputs
            needs = {f"need_{what}": f"{what}0" in need for what in ("da", "db")}
            call = (o.a, o.b, zs[0], o.alpha_t, self.seed(), o.spec, self.rows)
            if self.weight is not None:
                dx, *found = backend.linear_backward(o.dy, self.x, self.weight, *call, **needs)
                if self.weight.dim() == 3:
                    dx[self.behind()] = 0  # undefined
                dx = dx if "dx" in need else None  # which comes always
            else:
                needs |= {} if dx is None else {"dx": dx}
                dx, *found = backend.backward(o.dy, self.x, *call, need_dx="dx" in need, **needs)
            das, dbs = [[t] for t in found]
        named = [(f"da{i}", t) for i, t in enumerate(das)] + [(f"db{i}", t) for i, t in enumerate(dbs)]
        return {"dx": dx} | dict(named)

    def members(self) -> list[Member]:
        return [Member(o.a, o.b, o.alpha_t, o.spec) for o in self.outputs]

    def seed(self) -> Tensor | None:
        return torch.tensor(self.dropout_seed, device=self.x.device) if self.outputs[0].spec.dropout else None

    def mask(self) -> dict:
        """Return the mask of dropout and its rounded probability, if there is one."""
        return mask_and_p(self.outputs[0].spec.dropout / 256, self.dropout_seed, self.x)

    # --- the same in torch ops

    def plain(self, dtype: torch.dtype | None = None, order=ORDERS[0], rounded=lambda t: t) -> dict[str, Tensor]:
        """Return what torch gives, in its own dtype or in ``dtype``, with sums in an order of helpers.ORDERS, of
        operands that ``rounded`` has rounded."""
        there, back = order

        def leaf(t: Tensor) -> Tensor:
            return rounded(packed(t.detach())).to(dtype or t.dtype).requires_grad_()

        x, ys, zs = leaf(self.x), [], []
        weights = [(leaf(o.a), leaf(o.b)) for o in self.outputs]
        for o in self.outputs:
            zeros = torch.zeros_like(o.dy, dtype=x.dtype, requires_grad=True)
            ys.append((zeros if o.base is None else packed(o.base).to(x.dtype).requires_grad_()).clone())
            zs.append(x.new_zeros(len(x), o.a.shape[-2]))
        if self.weight is not None:
            ys = [self._frozen_product(x, rounded)]
        for i, g, rows, own_a, _, alpha_t, scaling in self.branches():
            rank, (a, b), activation = len(own_a), weights[i], self.outputs[i].spec.activation
            if self.rows is not None:
                a, b = a[g, :rank], b[g, :, :rank]
            if rank == 0 or rows.start == rows.stop:
                continue
            mask = self.mask()
            mask |= {"mask": there(mask["mask"][rows])} if mask else {}
            own = [there(t) for t in (x[rows], a, b)]
            activation = next(iter(ACTIVATIONS)) if activation == IDENTITY else activation
            y = eager(*own, alpha_t, activation=activation, scaling=scaling, base=there(ys[i][rows]), **mask)
            dropped = own[0] * mask["mask"] / (1 - mask["p"]) if mask else own[0]
            z = F.linear(packed(dropped), packed(own[1].to(x.dtype)))
            ys[i][rows], zs[i][rows, :rank] = back(y), back(z).detach()
        leaves = [x, *(t for pair in weights for t in pair)]
        dys = [rounded(packed(o.dy)).to(x.dtype) for o in self.outputs]
        dx, *gradients = torch.autograd.grad(ys, leaves, dys, allow_unused=True, materialize_grads=True)
        found = {"dx": dx}
        for i, (y, z) in enumerate(zip(ys, zs, strict=True)):
            found |= {f"y{i}": y.detach(), f"z{i}": z, f"da{i}": gradients[2 * i], f"db{i}": gradients[2 * i + 1]}
        return found

    def matrices(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield the rows of each frozen matrix, the matrix and its bias."""
        weight, bias, start = self.weight, self.bias, 0
        ends = [len(self.x)]
        if weight.dim() == 3:
            each = len(self.rows.offsets) // len(weight)
            ends = self.rows.offsets.tolist()[each - 1 :: each]
        for e, end in enumerate(ends):
            own_bias = bias if bias is None or bias.dim() == 1 else bias[e]
            yield slice(start, end), weight if weight.dim() == 2 else weight[e], own_bias
            start = end

    def _frozen_product(self, x: Tensor, rounded) -> Tensor:
        y = x.new_zeros(len(x), self.weight.shape[-2])
        for rows, matrix, bias in self.matrices():
            matrix, bias = (None if t is None else rounded(packed(t)).to(x.dtype) for t in (matrix, bias))
            y[rows] = F.linear(x[rows], matrix, bias)
        return y

    def check(self, got: dict[str, Tensor]) -> None:
        """Compare with float64 by the project's rule."""
        assert_accurate(got, self.plain(torch.float64), self.in_order, self.x.dtype, str(self))

    def in_order(self, order) -> dict[str, Tensor]:
        """Return what torch gives in the dtype of the problem, which is what its accuracy is measured by."""
        return self.plain(None, order, _without_13_bits if self.tf32 else lambda t: t)

    # --- parts of it

    def with_packed_operands(self) -> "Problem":
        outputs = [
            replace(
                o, a=packed(o.a), b=packed(o.b), dy=packed(o.dy), base=None if o.base is None else packed(o.base),
                layout="packed",
            ) for o in self.outputs
        ]  # fmt: skip
        weight = None if self.weight is None else packed(self.weight)
        return replace(self, x=packed(self.x), outputs=outputs, weight=weight)

    def of_rows(self, rows: slice) -> "Problem":
        """Return the call of some rows of a lone branch, or of layers that share x."""
        outputs = [
            replace(o, dy=o.dy[rows], base=None if o.base is None else o.base[rows], layout="packed")
            for o in self.outputs
        ]
        return replace(self, x=self.x[rows], outputs=outputs)

    def parts(self, *, same_r: bool) -> Iterator[tuple["Problem", dict]]:
        """Yield the lone call of each member, or of each owner that has rows and a rank (with ``same_r`` of A and B as
        large as those of the whole, with zeros beyond the rank), and where its results are in those of the whole:
        (name, index) by name."""
        for i, g, rows, a, b, alpha_t, scaling in self.branches():
            if len(a) == 0 or rows.start == rows.stop:
                continue
            o, rank = self.outputs[i], len(a)
            if self.rows is not None and same_r:
                a, b = o.a[g].clone(), o.b[g].clone()
                a[rank:], b[:, rank:] = 0, 0
            spec = o.spec._replace(scaling=scaling)
            alpha = None if o.alpha_t is None else torch.tensor(alpha_t, device=self.x.device)
            base = None if o.base is None else o.base[rows]
            own = Output(a, b, alpha, spec, base, o.accumulates, o.dy[rows])
            where = {"y0": (f"y{i}", rows), "z0": (f"z{i}", (rows, slice(rank)))}
            if self.rows is not None:
                where |= {"dx": ("dx", rows), "da0": ("da0", (g, slice(rank))), "db0": ("db0", (g, ..., slice(rank)))}
            part = Problem("lone", self.x[rows], [own], tf32=self.tf32, title=f"branch {g or i} of {self}")
            if self.weight is not None:
                own.a, own.b = own.a[None], own.b[None]
                own.alpha_t = None if alpha is None else alpha[None]
                part.kind, part.rows = "experts", Rows(torch.tensor([len(part.x)]).to(self.rows.offsets), None, None)
                each = len(self.rows.offsets) // len(self.weight) if self.weight.dim() == 3 else 1
                part.weight = self.weight if self.weight.dim() == 2 else self.weight[g // each][None]
                part.bias = self.bias if self.bias is None or self.bias.dim() == 1 else self.bias[g // each][None]
                of_owner = slice(g, g + 1)
                where |= {"da0": ("da0", (of_owner, slice(rank))), "db0": ("db0", (of_owner, ..., slice(rank)))}
            yield part, where

    def with_ranks_of(self, owner: int) -> "Problem":
        """Return the call in which no other owner has a rank."""
        ranks = torch.zeros_like(self.rows.offsets)
        ranks[owner] = self.outputs[0].a.shape[1] if self.rows.ranks is None else self.rows.ranks[owner]
        return replace(self, rows=self.rows._replace(ranks=ranks))


def _without_13_bits(t: Tensor) -> Tensor:
    """What a tensor core reads of a float32."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)
