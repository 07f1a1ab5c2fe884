"""bench/model/ragged_launches.py: its bytes are those that the compiled kernels move on the PTX machine, kernel by
kernel, and what it says."""

import re
from collections import Counter

import ptx_cuda
import pytest
import torch
from conftest import skip_unless_available
from cuda_ragged import Ragged as Problem

from bench.model import __main__ as command
from bench.model.cuda_launches import H100
from bench.model.ragged_launches import Ragged, busy_share, kernels, overhead, product

on_ptx = pytest.mark.skipif(ptx_cuda._cuda_on_ptx is None, reason="built with nvcc and the emulator only")
FINDING = {"ends", "ranks", "alpha_t", "scaling"}  # by which a block finds its group and what belongs to it


@pytest.fixture(autouse=True)
def _planned():
    """Without CUDA kernels in the build, the emulator plans the launches."""
    skip_unless_available("cuda_emulated")
    torch.manual_seed(1)


def moved() -> Counter:
    """Return the bytes of the launches since the last call, by the model's names of the kernels."""
    found = Counter()
    for launch in ptx_cuda._cuda_on_ptx.take_launches():
        name = re.search(r"afa\d+(?:ragged_)?(\w+?)_kernel", launch["kernel"])[1]
        if name == "project" and "Lb1" in launch["kernel"]:
            name = "project_dy"
        found[name] += sum(read + written for what, (read, written) in launch["traffic"].items() if what not in FINDING)
    return found


def modelled(directions) -> Counter:
    found = Counter()
    for direction in directions:
        for kernel in direction:
            found[kernel.name] += kernel.hbm + kernel.l2
    return found


# Even and skewed groups, some without rows, in one pass and split, in one chunk of rows and in several.
CASES = {
    "even": ((64, 64, 64), 264, 256, 16, 0),
    "odd": ((40, 0, 65, 3), 72, 80, 12, 5),
    "split": ((1, 70, 0), 904, 520, 16, 3),
    "skewed": ((0, 600, 2, 0, 1100), 136, 264, 16, 7),
    "rank 20": ((33, 0, 90), 520, 528, 20, 0),
    "rank 64": ((100, 0, 1), 520, 328, 64, 3),
    "rank 50, few columns": ((30, 70), 72, 136, 50, 0),
    "rank 128": ((129, 0, 40), 264, 520, 128, 9),
}


@on_ptx
@pytest.mark.parametrize("adds_dx", [False, True], ids=["", "adds to dx"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_bytes_of_every_kernel(case, weights, adds_dx):
    sizes, k, n, r, behind = CASES[case]
    problem = Problem(sizes, k, n, r, weights=weights, behind=behind)
    ptx_cuda._cuda_on_ptx.take_launches()
    _, z = problem.forward(ptx_cuda.NAME)
    problem.backward(ptx_cuda.NAME, z, dx=torch.zeros_like(problem.x) if adds_dx else None)
    call, float_weights = Ragged(sizes, k, n, r, behind), weights == torch.float32
    assert moved() == modelled(kernels(call, float_weights=float_weights, adds_dx=adds_dx))


@on_ptx
@pytest.mark.parametrize(("r", "behind", "carried"), [(16, 7040, False), (16, 10600, True), (32, 5300, True)])
def test_bytes_of_a_backward_in_rounds_of_columns(r, behind, carried):
    """More partial sums than there is room for: of those over rows, and of dh."""
    problem = Problem((1,), 16, 28672, r)
    z = torch.zeros(1 + behind, r, dtype=torch.bfloat16)
    ptx_cuda._cuda_on_ptx.take_launches()
    problem.lengthened(behind).backward(ptx_cuda.NAME, z)
    call = Ragged((1,), 16, 28672, r, behind)
    backward = kernels(call, float_weights=False, adds_dx=False)[1]
    assert [kernel.name for kernel in backward] == ["dy", *["reduce"] * carried, "rows", "x"]
    assert moved() == modelled([backward])


def test_the_command_prints_a_mixture_of_experts(capsys):
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    for experts in command.EXPERTS:
        assert f"{experts.name}: 128 experts" in shown


def test_blocks_that_differ_leave_places_idle():
    assert busy_share([64] * 100, 132, 132) == 1.0
    assert busy_share([64] * 198, 132, 132) == pytest.approx(0.75)
    assert busy_share([10] * 9 + [100], 10, 10) == pytest.approx(0.19)
    # A long block that starts last is waited for; one that starts first is not.
    assert busy_share([10] * 90 + [90], 10, 10) < 0.6 < 0.99 < busy_share([90] + [10] * 91, 10, 10)
    # Two blocks on each multiprocessor, of which one is enough: the second half of the last wave is as fast.
    assert busy_share([64] * 384, 264, 132) == pytest.approx(384 / 132 / 3)
    first, last = (Ragged(sizes, 2048, 512, 128) for sizes in ((8000, *[400] * 60), (*[400] * 60, 8000)))
    x = [next(kernel for kernel in kernels(call)[1] if kernel.name == "x") for call in (first, last)]
    assert x[1].busy < 0.9 * x[0].busy
    assert x[0]._replace(busy=x[0].busy / 2).seconds(H100, "bad")[0] > 1.5 * x[0].seconds(H100, "bad")[0]


def test_looking_for_a_group_takes_time_where_nothing_hides_it():
    even = Ragged.routed(command.EXPERTS[0], command.ROUTED_ROWS, 16)
    for kernel in (kernel for direction in kernels(even) for kernel in direction if kernel.found):
        shorter = kernel._replace(found=0.0)
        lost = kernel.seconds(H100, "bad")[0] - shorter.seconds(H100, "bad")[0]
        assert lost == pytest.approx(kernel.found * H100.latency.bad)


def test_a_backward_that_adds_to_dx_reads_it_too():
    even = Ragged.routed(command.EXPERTS[0], command.ROUTED_ROWS, 16)
    apart, adding = (kernels(even, adds_dx=adds)[1] for adds in (False, True))
    assert apart[:-1] == adding[:-1]
    assert adding[-1].hbm - apart[-1].hbm == 2 * even.m * even.k
    whole = overhead(even).backward.good / 100 * product(even, H100, "good")
    assert whole == pytest.approx(sum(kernel.seconds(H100, "good")[0] for kernel in adding))


@pytest.mark.parametrize("rows", [65536, 131072])
def test_a_pass_over_dy_and_few_rounds_of_columns(rows):
    """What made the backward of these experts slow: two passes over dy, and x in a launch for each slab."""
    for experts in command.EXPERTS:
        backward = {kernel.name: kernel for kernel in kernels(Ragged.routed(experts, rows, 16))[1]}
        assert "dy" in backward and "db" not in backward
        assert backward["x"].launches == rows // 65536
        assert backward["dy"].blocks >= 2, "one block begins while another one streams"
