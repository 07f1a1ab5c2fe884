"""What a call allocates, saves and runs, counted, and the record that holds it."""

import dataclasses
import json

import torch

from bench.memory import allocations, saved_bytes
from bench.model import counts
from bench.providers import providers


def test_allocations_are_counted_with_their_peak():
    def call():
        first = torch.empty(1000, dtype=torch.float32)
        del first
        return torch.empty(250, dtype=torch.float32), torch.empty(250, dtype=torch.float32)

    assert allocations(call) == (4000, 6000)


def test_saved_bytes_count_a_storage_once_and_no_operand():
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: x.exp().sum(), [x]) == 400  # exp saves its result
    assert saved_bytes(lambda: (x * x).sum(), [x]) == 0
    assert saved_bytes(lambda: (x * x).sum(), []) == 400


def test_no_call_does_more_than_recorded():
    worse, _ = counts.compare(counts.measure(), json.loads(counts.RECORDED.read_text()))
    assert not worse, "\n".join([*worse, "if this is meant: python -m bench.model --write-counts"])


def test_the_counts_see_one_gemm_and_one_saved_tensor_more():
    class Heavier(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.lora_a, self.lora_b = module.lora_a, module.lora_b

        def forward(self, x):
            return self.module(x) + 1e-9 * (x @ self.lora_a.T).exp().mean()

    ours = providers()["afa.torch"]

    def heavier(*arguments):
        module = Heavier(ours.layer(*arguments)[0])
        return module, (module.lora_a, module.lora_b)

    case = counts.CASES["layer"]
    before = counts.counts(ours, case)
    after = counts.counts(dataclasses.replace(ours, layer=heavier), case)
    worse, better = counts.compare({"layer": {"x": after}}, {"layer": {"x": before}})
    assert not better
    assert {text.split(": ")[1].split()[0] for text in worse} >= {"gemms", "saved_bytes"}
    assert counts.compare({"layer": {"x": before}}, {"layer": {"x": after}})[0] == []
    assert counts.compare({"layer": {"x": before}}, {})[0] == ["layer, x: not recorded"]
