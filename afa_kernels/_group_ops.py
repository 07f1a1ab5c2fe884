"""The operators of layers that share their input: one pass over x for z of all of them, and one for
dA of all of them and dx.

Nothing here is new arithmetic: the stacked matrices are one call of a backend, and the branch of a
member is the ordinary call on ``x := z_i`` with ``A := I``, whose own z is then exactly z_i.
So every backend serves a group without knowing of it.
"""

import torch
from torch import Tensor

from afa_kernels import _ops, reference
from afa_kernels.activation import IDENTITY
from afa_kernels.backend import frozen, registry
from afa_kernels.backend.registry import Backend, Call
from afa_kernels.options import Spec
from afa_kernels.reference import compute_dtype

_MEMBERS = "Tensor[] lora_a, Tensor[] lora_b, Tensor[] alpha_t, str[] activations, float[] scalings"
# z and dx of all members are plain products: a branch whose phi is the identity.
_LINEAR = Spec(IDENTITY, 1.0, 0)


def _backends(x: Tensor, b: list[Tensor], specs: list[Spec], name: str | None) -> list[Backend]:
    return [registry.select(_ops.call_of(x, b_i, spec), name).backend for b_i, spec in zip(b, specs, strict=True)]


def _able(backend: Backend, x: Tensor, k: int, n: int, r: int, activation: str) -> Backend:
    """Return ``backend``, or ``torch`` where it cannot take a call of these sizes (a stacked rank
    beyond its limit, say)."""
    call = Call(x.device.type, x.dtype, x.shape[0], k, n, r, activation, False, x.device.index)
    return backend if backend.why_not(call) is None else registry.get("torch")


class _Group:
    """What forward and backward share: the stacked matrix, the unit matrix, who computes what."""

    def __init__(self, x, a, b, alpha_t, activations, scalings, backend):
        self.x, self.a, self.b, self.alpha_t = x, a, b, alpha_t
        self.ranks = [a_i.shape[0] for a_i in a]
        self.specs = [Spec(*pair) for pair in zip(activations, scalings, strict=True)]
        self.chosen = _backends(x, b, self.specs, backend)
        self.unit = torch.eye(sum(self.ranks), dtype=x.dtype, device=x.device)

    def _stacked(self, members: list[int]) -> tuple[Tensor, Tensor, Backend]:
        """Return the members' stacked A, a unit matrix for B, and the backend of their product."""
        a = torch.cat([self.a[i] for i in members])
        r, k = a.shape
        return a, self.unit[:r, :r], _able(self.chosen[members[0]], self.x, k, r, r, IDENTITY)

    def _member(self, i: int) -> tuple[Backend, Tensor | None, Spec]:
        """Return the backend of member i's branch on z, alpha_t and the spec."""
        spec, r, n = self.specs[i], self.ranks[i], self.b[i].shape[0]
        alpha_t = None if spec.activation == IDENTITY else self.alpha_t[i]
        return _able(self.chosen[i], self.x, r, n, r, spec.activation), alpha_t, spec

    def project(self) -> Tensor:
        """Return ``z = x @ A.T`` with the stacked A, ``(M, R)``."""
        a, unit, chosen = self._stacked(list(range(len(self.a))))
        z = torch.empty(self.x.shape[0], a.shape[0], dtype=self.x.dtype, device=self.x.device)
        chosen.forward(self.x, a, unit, None, None, _LINEAR, base=None, out=z, save_z=False)
        return z

    def forward(self, i: int, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of member i from its z."""
        chosen, alpha_t, spec = self._member(i)
        unit = self.unit[: z.shape[1], : z.shape[1]]

        def branch(base: Tensor | None, out: Tensor) -> None:
            chosen.forward(z, unit, self.b[i], alpha_t, None, spec, base=base, out=out, save_z=False)

        return frozen.forward(chosen, spec, self.x, weight, bias, branch)[0]

    def branch_backward(self, i: int, dy: Tensor, z: Tensor, need_dz: bool, need_db: bool):
        """Return dz and db of member i: one pass over its dy."""
        chosen, alpha_t, spec = self._member(i)
        unit = self.unit[: z.shape[1], : z.shape[1]]
        dz, _, db = chosen.backward(
            dy, z, unit, self.b[i], z, alpha_t, None, spec, need_dx=need_dz, need_da=False, need_db=need_db
        )  # fmt: skip
        return dz, db

    def backward(self, dz: dict[int, Tensor], products: list[tuple[Tensor, Tensor]], need_dx: bool, need_da: bool):
        """Return dx, the sum of ``dz_i @ A_i`` and of ``dy @ weight`` over ``products``, and dA by member: one pass
        over x."""
        a, unit, chosen = self._stacked(list(dz))
        dz_all = torch.cat(list(dz.values()), 1)

        def branch(dx: Tensor | None):
            into = {} if dx is None else {"dx": dx}
            dx, da, _ = chosen.backward(
                dz_all, self.x, a, unit, dz_all, None, None, _LINEAR,
                need_dx=need_dx, need_da=need_da, need_db=False, **into,
            )  # fmt: skip
            return dx, da

        dx, da = frozen.backward(chosen, _LINEAR, products, branch) if need_dx else branch(None)
        stacked = () if da is None else da.split([self.ranks[i] for i in dz])
        return dx, dict(zip(dz, stacked, strict=False))


def _group_forward(x, weights, biases, a, b, alpha_t, activations, scalings, save_z, backend) -> list[Tensor]:
    with _ops.plain_precision(x):
        group = _Group(x, a, b, alpha_t, activations, scalings, backend)
        if x.shape[0] == 0:
            return _fake_group_forward(x, weights, biases, a, b, alpha_t, activations, scalings, save_z, backend)
        z = group.project()
        ys = []
        for i, z_i in enumerate(z.split(group.ranks, 1)):
            ys.append(group.forward(i, z_i, weights[i], biases[i]))
    return [*ys, z if save_z else x.new_empty(0)]


def _group_backward(
    dys, x, weights, a, b, z, alpha_t, activations, scalings, backend, need_dx, need_da, need_db
) -> list[Tensor]:
    fake = _fake_group_backward(
        dys, x, weights, a, b, z, alpha_t, activations, scalings, backend, need_dx, need_da, need_db
    )
    if x.shape[0] == 0:
        return [t.zero_() for t in fake]
    with _ops.plain_precision(x):
        group = _Group(x, a, b, alpha_t, activations, scalings, backend)
        if z is None:
            z = group.project()
        da, db, dz = {}, {}, {}
        for i, z_i in enumerate(z.split(group.ranks, 1)):
            if dys[i] is None:
                continue
            dz_i, db_i = group.branch_backward(i, dys[i], z_i, need_dx or need_da[i], need_db[i])
            if dz_i is not None:
                dz[i] = dz_i
            if db_i is not None:
                db[i] = db_i
        dx = None
        if dz:
            products = [(dys[i], weights[i]) for i in dz]
            dx, stacked = group.backward(dz, products, need_dx, any(need_da[i] for i in dz))
            # Copies: results of an operator may not be views of one tensor.
            da = {i: t.to(a[i].dtype, copy=True) for i, t in stacked.items() if need_da[i]}
    results = [dx, *(da.get(i) for i in range(len(a))), *(db.get(i) for i in range(len(b)))]
    return [f if t is None else t for t, f in zip(results, fake, strict=True)]


def _fake_group_forward(x, weights, biases, a, b, alpha_t, activations, scalings, save_z, backend) -> list[Tensor]:
    m = x.shape[0]
    ys = [x.new_empty(m, w.shape[0]) for w in weights]
    return [*ys, x.new_empty(m, sum(a_i.shape[0] for a_i in a)) if save_z else x.new_empty(0)]


def _fake_group_backward(
    dys, x, weights, a, b, z, alpha_t, activations, scalings, backend, need_dx, need_da, need_db
) -> list[Tensor]:
    given = [dy is not None for dy in dys]
    wanted = [
        (x, need_dx and any(given)),
        *((t, need and g) for t, need, g in zip(a, need_da, given, strict=True)),
        *((t, need and g) for t, need, g in zip(b, need_db, given, strict=True)),
    ]
    return [torch.empty(t.shape if needed else 0, dtype=t.dtype, device=t.device) for t, needed in wanted]


def differentiable_backward(dys, x, weights, a, b, alpha_t, activations, scalings):
    """Return dx, every da and every db as plain torch ops: the sum of the members' closed
    formulas."""
    dx, da, db = torch.zeros_like(x, dtype=compute_dtype(x.dtype)), [], []
    with _ops.plain_precision(x):
        for i, dy in enumerate(dys):
            if dy is None:
                da.append(None)
                db.append(None)
                continue
            spec = Spec(activations[i], scalings[i], 0)
            dx_i, da_i, db_i = reference.backward(dy, x, a[i], b[i], alpha_t[i], None, spec)
            dx = dx + dx_i + dy @ weights[i]
            da.append(da_i)
            db.append(db_i)
    return dx.to(x.dtype), da, db


group_forward = _ops.define(
    "group_forward",
    f"(Tensor x, Tensor[] weights, Tensor?[] biases, {_MEMBERS}, bool save_z, str? backend) -> Tensor[]",
    _group_forward,
    _fake_group_forward,
)
group_backward = _ops.define(
    "group_backward",
    "(Tensor?[] dys, Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor? z, "
    "Tensor[] alpha_t, str[] activations, float[] scalings, str? backend, bool need_dx, "
    "bool[] need_da, bool[] need_db) -> Tensor[]",
    _group_backward,
    _fake_group_backward,
)
