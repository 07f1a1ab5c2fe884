"""Tensor parallelism: styles for torch's ``parallelize_module`` that shard an AFALinear.

Everything is computed on local shards by the ordinary functions, with the communication that a
sharded linear layer has anyway and, row-wise, one of ``(M, r)`` elements more: phi is not linear,
so z must be summed before it.

| style | weight (N, K) | lora_a (r, K) | lora_b (N, r) | communication |
|---|---|---|---|---|
| ColwiseAFA | N | whole | N | backward: sum of dx and dA |
| RowwiseAFA | K | K | r | forward: reduce-scatter of z over r, sum of y; backward: gather of dz |
"""

from functools import partial

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

from afa_kernels.base_layer import is_plain
from afa_kernels.functional import linear, lora
from afa_kernels.layer import AFALinear


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
        module._parallel = self._forward
        # distribute_module would also make a DTensor of alpha_t_buffer, which kernels read as a plain tensor.
        module.register_forward_pre_hook(partial(_prepare_input, self.input_layouts, self.desired_input, device_mesh))
        module.register_forward_hook(partial(_prepare_output, self.output_layouts, self.use_local_output))
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
        mesh, everywhere = x.device_mesh, [Partial()]
        y = linear(
            x.to_local(grad_placements=everywhere),
            _local_weight(layer),
            _local(layer.base_layer.bias),
            layer.lora_a.to_local(grad_placements=everywhere),
            layer.lora_b.to_local(),
            layer.coefficient(),
            layer.options,
        )
        return DTensor.from_local(y, mesh, [Shard(x.dim() - 1)], run_check=False)


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


def _prepare_input(given: Placement, desired: Placement, mesh: DeviceMesh, _module, inputs):
    x = inputs[0]
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [given], run_check=False)
    return (x.redistribute(placements=[desired]), *inputs[1:])


def _prepare_output(wanted: Placement, local: bool, _module, _inputs, y: DTensor):
    y = y.redistribute(placements=[wanted])
    return y.to_local() if local else y


def _local(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to_local()


def _local_weight(layer: AFALinear) -> Tensor:
    weight = layer.base_layer.weight.to_local()
    return weight.T if layer.transposed else weight
