"""bench.model beside a synthetic card in the place of a GPU: fits, figures, verdicts; and the meter of a real one, as
far as a CPU can run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import skip_unless_available

pytest.importorskip("triton")

from bench.model import on_card  # noqa: E402
from bench.model.cuda_launches import H100, Gpu, Layer, Range, decoding, overhead  # noqa: E402
from bench.model.meter import CardMeter, Event, by_kernel  # noqa: E402
from tools import gpu_measure  # noqa: E402
from tools.gpu_right import Card  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CARD = "NVIDIA H100 80GB HBM3"
RANGES = ("memory", "l2", "latency", "launch", "hidden", "unhidden")
# In the middle of every range: the model is right there.
SOUND = H100._replace(**{name: Range(*[sum(getattr(H100, name)) / 2] * 2) for name in RANGES})
SMALL = Card("cpu", cuda="cuda_ptx", small=True, dtype=torch.float16)


class Synthetic:
    """A card that is what the model makes of ``gpu``, but for the figures in ``factors``."""

    def __init__(self, gpu: Gpu = SOUND, **factors: float):
        self.gpu, self.factors = gpu, factors

    def mapped(self, nbytes):
        rate = self.gpu.l2 if 2 * nbytes < 40 << 20 else self.gpu.memory
        return self.gpu.launch.good + 2 * nbytes / rate.good

    def load(self):
        return self.gpu.latency.good

    def launch(self):
        return self.gpu.launch.good

    def hidden(self):
        return self.gpu.hidden.good

    def gemm(self, m, k, n):
        product = 2 * m * k * n / self.gpu.gemm
        return product, product + self.gpu.unhidden.good * 2 * m * n / self.gpu.memory.good

    def kernels(self, layer):
        return tuple(
            {name: taken.good * self.factors.get(name, 1.0) for name, taken in direction.items()}
            for direction in on_card.durations(layer, self.gpu)
        )

    def step(self, layer, alpha_t):
        name = "taxes" if len(layer.members) > 1 else "tax" if alpha_t else "identity"
        factor = self.factors.get(name, 1.0)
        return 1.0 + overhead(layer, self.gpu).both.good * factor / 100, 1.0

    def token(self, layer):
        return 1.0 + decoding(layer, self.gpu).good * self.factors.get("token", 1.0) / 100, 1.0


@pytest.fixture(autouse=True)
def _planned():
    """The kernels' own host code plans the launches."""
    skip_unless_available("cuda_ptx")


def rows(meter: Synthetic, card: str = CARD) -> list[dict]:
    return list(gpu_measure.rows_of(on_card.compare(meter), card))


def off(found: list[dict]) -> set[str]:
    return {row["figure"] for row in found if row["verdict"] != "ok"}


def test_a_card_that_is_as_modelled_passes():
    found = rows(Synthetic())
    assert not off(found) and not any("fault" in row for row in found)
    names = [row["figure"] for row in found]
    assert len(set(names)) == len(names)
    assert {*RANGES, "gemm", "a layer, r=16: x, backward", "q, k, v: tax", "one token, in a graph"} <= set(names)
    kernel = next(row for row in found if row["figure"] == "a layer, r=64: project_dy, backward")
    assert kernel["with measured assumptions"] == kernel["measured"]


@pytest.mark.parametrize("name", RANGES)
def test_the_assumptions_are_fitted(name):
    for factor in (0.5, 3.0):
        truth = SOUND._replace(**{name: Range(*(value * factor for value in getattr(SOUND, name)))}, gemm=5e14)
        got = on_card.measured_gpu(Synthetic(truth))
        for field in (*RANGES, "gemm"):
            value = getattr(truth, field)
            assert getattr(got, field) == pytest.approx(value, rel=1e-6), field


@pytest.mark.parametrize("name", [*RANGES, "gemm"])
@pytest.mark.parametrize("above", [False, True])
def test_an_assumption_outside_of_its_range_fails(name, above):
    ends = [H100.gemm] if name == "gemm" else getattr(H100, name)
    value = 1.1 * max(ends) if above else 0.9 * min(ends)
    wrong = value if name == "gemm" else Range(value, value)
    found = rows(Synthetic(SOUND._replace(**{name: wrong})))
    assert name in off(found) and any(row["figure"] == name and "fault" in row for row in found)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize(
    "what",
    ["pack", "forward", "dy", "x", "reduce", "project_dy", "db", "tax", "identity", "taxes", "token"],
)
def test_a_figure_outside_of_its_range_fails_alone(what, factor):
    found = rows(Synthetic(**{what: factor}))
    names = {"tax": "a layer: tax", "identity": "a layer at identity: tax", "taxes": ": tax", "token": "in a graph"}
    said = names.get(what, f": {what}, ")
    wrong = off(found)
    assert wrong and all(said in name for name in wrong), wrong
    faults = [row["fault"] for row in found if "fault" in row]
    assert len(faults) == len(wrong) and all(f"off by {'+' if factor > 1 else '-'}" in fault for fault in faults)


def test_kernels_that_the_model_does_not_know_cost_their_own_figures_alone():
    meter = Synthetic()
    known = meter.kernels

    def kernels(layer):
        forward, backward = known(layer)
        backward.pop("pack", None)
        return forward, backward | {"surprise": 1e-5}

    meter.kernels = kernels
    verdicts = {row["figure"]: row["verdict"] for row in rows(meter)}
    assert verdicts["a layer, r=16: surprise, backward"] == "not modelled"
    assert verdicts["a layer, r=16: x, backward"] == "ok"
    missing = [verdict for name, verdict in verdicts.items() if name.endswith(": pack, backward")]
    assert missing and set(missing) == {"off by -100%"}


def test_a_card_that_the_model_does_not_know_gets_no_verdict():
    found = rows(Synthetic(x=9.0), card="NVIDIA L4")
    assert off(found) and not any("fault" in row for row in found)


def test_noise_that_turns_two_sizes_around_is_no_rate():
    meter = Synthetic()
    meter.mapped = lambda nbytes: 1e-3
    wrong = {figure.name for figure in on_card.assumptions(on_card.measured_gpu(meter)) if figure.off}
    assert {"memory", "l2"} <= wrong


@pytest.mark.parametrize("layer", [Layer(8, 16, 24, 4), Layer(8, 16, (24, 8), (4, 4))], ids=["lone", "shared"])
def test_the_meter_of_a_card_runs_what_it_times(layer):
    meter = CardMeter(SMALL)
    times = [
        meter.mapped(64),
        meter.launch(),
        *meter.gemm(8, 16, 24),
        *meter.step(layer, 0.5),
        *meter.step(layer, 0.0),
        *meter.token(layer),
    ]
    assert all(seconds > 0 for seconds in times)
    assert meter.hidden() >= 0


@pytest.mark.parametrize(
    "layer",
    [
        Layer(70, 256, 256, 16),
        Layer(70, 256, (256, 128), (16, 16)),
        Layer(64, 128, 128, 64),
        Layer(1, 256, 256, 16),
    ],
    ids=str,
)
def test_the_kernels_of_a_profile_have_the_names_of_the_model(layer):
    from afa_kernels import _cuda_on_ptx

    class OnPtx(CardMeter):
        def recorded(self, call, *arguments):
            _cuda_on_ptx.take_launches()
            result = call(*arguments)
            launched = enumerate(_cuda_on_ptx.take_launches())
            return result, [Event(launch["kernel"], at, at + 1) for at, launch in launched]

    taken = OnPtx(SMALL).kernels(layer)
    assert [set(each) for each in taken] == [set(each) for each in on_card.durations(layer, H100)]


def test_the_time_of_a_kernel_in_a_profile_starts_when_it_no_longer_waits():
    ours = "void afa::{}_kernel<afa::Bf16, 16>(afa::{}Params)"
    events = [
        (ours.format("x", "Outer"), 14_000, 27_000),  # waits for the product until 20
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 8_000, 20_000),
        (ours.format("dy", "Dy"), 1_000, 4_000),
        (ours.format("dy", "Dy"), 5_000, 7_000),
        ("void at::native::reduce_kernel<512, 1, float>()", 30_000, 35_000),
    ]
    taken = by_kernel(Event(*event) for event in events)
    assert taken == pytest.approx({"dy": 5e-6, "x": 7e-6})


_CHASE = """
import torch
from bench.model.meter import chase
chain = torch.randperm(4096).int()
place = torch.arange(256)
for _ in range(5):
    place = chain[place].long()
assert torch.equal(chase(chain, 5, 1), place.int())
"""


def test_a_chase_follows_the_permutation():
    variables = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", _CHASE], env=variables, cwd=ROOT, check=True)
