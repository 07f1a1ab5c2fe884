"""Tensor parallelism: styles for torch's ``parallelize_module`` that shard an AFALinear.

Everything is computed on local shards by the ordinary functions, with the communication that a
sharded linear layer has anyway and, row-wise, one of ``(M, r)`` elements more: phi is not linear,
so z must be summed before it.

| style | weight (N, K) | lora_a (r, K) | lora_b (N, r) | communication |
|---|---|---|---|---|
| ColwiseAFA | N | whole | N | backward: sum of dx and dA; one dx for layers that share x |
| RowwiseAFA | K | K | r | forward: reduce-scatter of z over r, sum of y; backward: gather of dz |
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from afa_kernels.layers.base_layer import is_plain
from afa_kernels.layers.linear import AFALinear
from afa_kernels.layers.shared_input import is_hooked
from afa_kernels.operator.functional import LinearCall, linear, lora
from afa_kernels.operator.shared_input import fitting, linear_shared


class _StyleAFA(ParallelStyle):
    desired_input: Placement
    default_output: Placement
    divisible: tuple[str, ...]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layouts = input_layouts or self.desired_input
        self.output_layouts = output_layouts or self.default_output
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._check(module, device_mesh)
        for owner, name, placement in self._placements(module):
            parameter = getattr(owner, name)
            if parameter is not None:
                shards = distribute_tensor(parameter, device_mesh, [placement], **self._source_of_data())
                sharded = nn.Parameter(shards, requires_grad=parameter.requires_grad)
                owner.register_parameter(name, sharded)
        # distribute_module would also make a DTensor of alpha_t_buffer, which kernels read as a plain tensor, and hooks
        # would make another DTensor of x for each of the layers that share it.
        module._parallel = _Shards(self, device_mesh)
        return module

    def _source_of_data(self) -> dict[str, int | None]:
        # parallelize_module sets it from torch 2.7 on.
        return {"src_data_rank": self.src_data_rank} if hasattr(self, "src_data_rank") else {}

    def _check(self, module: nn.Module, device_mesh: DeviceMesh) -> None:
        style = type(self).__name__
        if not isinstance(module, AFALinear):
            raise TypeError(f"{style}: expected an AFALinear, got a {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"{style}: expected a mesh of one dimension, got {device_mesh.ndim}")
        if module.merged or isinstance(module.lora_a, DTensor):
            raise ValueError(f"{style}: expected a layer that is neither merged nor sharded")
        if module.dropout > 0.0:
            raise ValueError(
                f"{style}: the dropout mask of a sharded layer would not be that of the whole one; "
                f"expected dropout=0, got {module.dropout}"
            )
        if not is_plain(module.base_layer):
            raise ValueError(f"{style}: expected a base layer without hooks or a forward of its own")
        size = device_mesh.size()
        for name in self.divisible:
            value = getattr(module, name)
            if value % size:
                raise ValueError(f"{style}: {name}={value} cannot be split evenly among {size} processes")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class ColwiseAFA(_StyleAFA):
    """Shard an :class:`AFALinear` over its outputs, as torch's ``ColwiseParallel`` does a linear
    layer.

    Args:
        input_layouts: placement of x, by default ``Replicate()``.
        output_layouts: placement of the output, by default ``Shard(-1)``.
        use_local_output: return the local tensor instead of a DTensor.

    Raises (from ``parallelize_module``):
        TypeError, ValueError: the module is no AFALinear, is merged, has dropout, or its
            ``out_features`` cannot be split evenly.

    Example: ``parallelize_module(model, mesh, {"mlp.up_proj": ColwiseAFA(), "mlp.down_proj":
    RowwiseAFA()})`` after :func:`afa_kernels.inject`.
    """

    desired_input = Replicate()
    default_output = Shard(-1)
    divisible = ("out_features",)

    @staticmethod
    def _placements(layer: AFALinear):
        return (
            (layer.base_layer, "weight", Shard(1 if layer.transposed else 0)),
            (layer.base_layer, "bias", Shard(0)),
            (layer, "lora_a", Replicate()),
            (layer, "lora_b", Shard(0)),
        )

    @staticmethod
    def _forward(layer: AFALinear, x: DTensor) -> DTensor:
        y = linear(x.to_local(grad_placements=[Partial()]), *ColwiseAFA._call(layer))
        return _split_over_outputs(y, x.device_mesh)

    @staticmethod
    def _call(layer: AFALinear) -> LinearCall:
        return LinearCall(
            _local_weight(layer),
            _local(layer.base_layer.bias),
            layer.lora_a.to_local(grad_placements=[Partial()]),
            layer.lora_b.to_local(),
            layer.coefficient(),
            layer.options,
        )


class RowwiseAFA(_StyleAFA):
    """Shard an :class:`AFALinear` over its inputs, as torch's ``RowwiseParallel`` does a linear
    layer.

    Args:
        input_layouts: placement of x, by default ``Shard(-1)``.
        output_layouts: placement of the output, by default ``Replicate()``; ``Shard(1)`` for
            sequence parallelism.
        use_local_output: return the local tensor instead of a DTensor.

    Raises (from ``parallelize_module``):
        TypeError, ValueError: as in :class:`ColwiseAFA`; ``in_features`` and ``r`` must split
            evenly.

    z is the sum of one partial product per process, each rounded to the dtype of x.
    """

    desired_input = Shard(-1)
    default_output = Replicate()
    divisible = ("in_features", "r")

    @staticmethod
    def _placements(layer: AFALinear):
        return (
            (layer.base_layer, "weight", Shard(0 if layer.transposed else 1)),
            (layer.base_layer, "bias", Replicate()),
            (layer, "lora_a", Shard(1)),
            (layer, "lora_b", Shard(1)),
        )

    @staticmethod
    def _forward(layer: AFALinear, x: DTensor) -> DTensor:
        mesh, last = x.device_mesh, x.dim() - 1
        x_local, bias = x.to_local(), _local(layer.base_layer.bias)
        y = F.linear(x_local, _local_weight(layer))
        if bias is not None and mesh.get_local_rank() == 0:
            y = y + bias.to(y.dtype)  # once, because y is summed over the processes
        z = F.linear(x_local, layer.lora_a.to_local().to(x_local.dtype))
        z = DTensor.from_local(z, mesh, [Partial()], run_check=False)
        z = z.redistribute(placements=[Shard(last)]).to_local()
        # z is known already. With x = z and A = I the branch computes exactly this z again.
        unit = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        b = layer.lora_b.to_local()
        y = lora(z, unit, b, layer.coefficient(), layer.options, base=y, inplace=True)
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)


class _Shards:
    """The forward of a layer, or of layers that share x, on the shards of this process: ``AFALinear._parallel``."""

    def __init__(self, style: _StyleAFA, mesh: DeviceMesh):
        self.style, self.mesh = style, mesh

    def __call__(self, layer: AFALinear, x: Tensor) -> Tensor:
        if layer._shared_input is not None:
            y = layer._shared_input.take(layer, x)
            if y is not None:
                return y
        x = self._input(x)
        return self._output(layer.base_layer(x) if layer.merged else self.style._forward(layer, x))

    def together(self, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
        """Return the output of each of ``layers``, or None where each has to compute its own.

        x becomes a DTensor once, so its gradient is one partial sum, and is reduced once. That is worth it with any
        backend, also one that computes the members one by one.
        """
        if not all(self._shares_input_with(layer) for layer in layers):
            return None
        local = self._input(x).to_local(grad_placements=[Partial()])
        calls, _ = fitting([ColwiseAFA._call(layer) for layer in layers], local)
        if calls is None:
            return None
        ys = linear_shared(local, calls)
        if ys is None:
            return None
        return [layer._parallel._output(_split_over_outputs(y, self.mesh)) for layer, y in zip(layers, ys, strict=True)]

    def _shares_input_with(self, layer: nn.Module) -> bool:
        other = getattr(layer, "_parallel", None)
        return (
            other is not None
            and isinstance(other.style, ColwiseAFA)
            and other.mesh == self.mesh
            and other.style.input_layouts == self.style.input_layouts
            and not layer.merged
            and not is_hooked(layer)
            and is_plain(layer.base_layer)
        )

    def _input(self, x: Tensor) -> DTensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [self.style.input_layouts], run_check=False)
        return x.redistribute(placements=[self.style.desired_input])

    def _output(self, y: DTensor) -> Tensor:
        y = y.redistribute(placements=[self.style.output_layouts])
        return y.to_local() if self.style.use_local_output else y


def _split_over_outputs(y: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(y, mesh, [Shard(y.dim() - 1)], run_check=False)


def _local(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to_local()


def _local_weight(layer: AFALinear) -> Tensor:
    weight = layer.base_layer.weight.to_local()
    return weight.T if layer.transposed else weight
