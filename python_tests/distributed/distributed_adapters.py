"""Several adapters in one process of the distributed tests: distributed_worker.py runs the checks."""

from pathlib import Path

import torch
import torch.distributed as dist
from distributed_helpers import Mlp, assert_parameters, data, expects, mine
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import afa_kernels as afa

# Of each sample, in each step: process 0 has the first half of a batch. In the second step "b" is in one process only.
BATCHES = [["a", "b", "a", "b"] * 2, ["a", "a", "a", "a", "b", "b", "a", "b"], ["a"] * 8]


def stacks() -> nn.Sequential:
    torch.manual_seed(0)
    made = afa.inject(nn.Sequential(Mlp(), Mlp(bias=False)), adapters={"a": {"r": 4}, "b": {"r": 3}, "idle": {}})
    for p in made.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.15)
    return made


def train(model: nn.Module, made: nn.Module, part, weight_decay=0.1) -> None:
    x, target = map(part, data())
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1, weight_decay=weight_decay)
    for names in BATCHES:
        with afa.adapters_of(made, part(names)):
            nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def my_part(batch):
    return mine(batch) if isinstance(batch, torch.Tensor) else batch[dist.get_rank() * 4 :][:4]


def check_ddp_with_adapters_that_some_batches_lack(_folder: Path) -> None:
    alone, made = stacks(), stacks()
    before = {name: p.clone() for name, p in made.named_parameters()}
    train(alone, alone, lambda batch: batch)
    train(DistributedDataParallel(made, find_unused_parameters=True), made, my_part)
    assert_parameters(made, alone)
    for name, p in made.named_parameters():
        assert torch.equal(p, before[name]) == (".idle." in name or not p.requires_grad), name
    made = stacks()
    with expects(RuntimeError, "find_unused_parameters=True"):
        train(DistributedDataParallel(made), made, my_part)


def check_fsdp2_with_adapters_that_some_processes_lack(_folder: Path) -> None:
    """An adapter that no process needs has a gradient of zeros there, so that weight decay would not leave it alone."""
    alone, made = stacks(), stacks()
    train(alone, alone, lambda batch: batch, weight_decay=0.0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in made:
        fully_shard(block, mesh=mesh)
    fully_shard(made, mesh=mesh).set_reduce_scatter_unused_params(True)
    train(made, made, my_part, weight_decay=0.0)
    assert_parameters(made, alone)
