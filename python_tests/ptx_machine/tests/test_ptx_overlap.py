"""Kernels that may start before the one before them has ended (programmatic dependent launch): what the PTX machine
reports of them, and that ours are launched so, and wait, where the card, the driver and the stream allow it."""

import re

import numpy as np
import ptx_cuda
import ptx_runtime_helpers
import pytest
import torch
from ptx_runtime_helpers import ALPHA_T, RTX_4090, SPEC, cuda_on_ptx, failure, forward, new_device, problem, runtime

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import PLACES, kernel, launch  # noqa: E402

_a_sound_machine, kept_allocations = ptx_runtime_helpers.sound_machine, ptx_runtime_helpers.kept_allocations

# --- The machine

COPY = "cp.async.cg.shared.global [%r4], [%rd9], 16, 16; cp.async.commit_group;"
STORE = "st.global.b32 [%rd8], %r0;"
WAIT = "griddepcontrol.wait;"
UNORDERED = {
    "a store before the wait": (STORE + WAIT, "race: stores to 'array 0' at byte .* without griddepcontrol.wait"),
    "a load before the wait": ("ld.global.b32 %r5, [%rd8];" + WAIT, "race: loads from 'array 0' at byte .* without"),
    "a copy before the wait": (COPY + "cp.async.wait_group 0;" + WAIT, "race: loads from 'array 0' at byte .* without"),
    "a store of lanes that do not wait": (
        "setp.lt.u32 %p1, %r0, 40; @%p1 griddepcontrol.wait;" + STORE, "lane 8: race: stores"
    ),
    "no wait at all": ("", "returns without griddepcontrol.wait"),
    "leave to start the next one, which is no wait": (
        "griddepcontrol.launch_dependents;" + STORE, "race: stores to 'array 0' at byte .* without griddepcontrol.wait"
    ),
}  # fmt: skip


def run_overlapped(body: str, overlaps: bool) -> np.ndarray:
    array = np.zeros(1024, dtype=np.uint32)
    launch(kernel(PLACES + body, shared=4096, threads=64), array, threads=64, overlaps=overlaps)
    return array


@pytest.mark.parametrize("name", UNORDERED)
def test_memory_of_the_kernel_before_is_waited_for(name):
    body, message = UNORDERED[name]
    run_overlapped(body, False)
    with pytest.raises(_ptx.ExecutionError, match=message):
        run_overlapped(body, True)


def test_a_kernel_that_waits_may_start_early():
    body = "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2];" + WAIT + "st.global.b32 [%rd8], %r5;"
    assert set(run_overlapped(body + "griddepcontrol.launch_dependents;", True)[:64]) == set(range(64))


# --- Our kernels


def of_many_kernels():
    """Return a problem whose kernels hand each other scratch memory, in several passes."""
    return problem(m=520, n=1032, r=64)


def launched(p, device=0, stream=0):
    """Return the results of a call, and its launches."""
    cuda_on_ptx.take_launches()
    y, z = forward(p, device, stream)
    with ptx_cuda.kernels.on(device, stream):
        gradients = ptx_cuda.kernels.backward(
            p.dy, p.x, p.lora_a, p.lora_b, z, ALPHA_T, None, SPEC, need_dx=True, need_da=True, need_db=True
        )  # fmt: skip
    return (y, z, *gradients), cuda_on_ptx.take_launches()


def forward_and_backward(p, device=0, stream=0):
    """Return the results of a call, and for each of its kernels whether it may start early."""
    results, launches = launched(p, device, stream)
    return results, [launch["overlaps"] for launch in launches]


def test_kernels_overlap_where_their_code_waits():
    """sm_90 has griddepcontrol, sm_80 does not; neither has the PTX of sm_80 on a newer card."""
    p = of_many_kernels()
    results, overlaps = forward_and_backward(p, 0)
    assert overlaps == [False] * 7  # project, expand, project_dy, reduce, db, x, reduce
    ada, blackwell = new_device(**RTX_4090), new_device(major=12, minor=0)
    for device, expected in ((1, True), (ada, False), (blackwell, True)):
        others, overlaps = forward_and_backward(p, device)
        assert set(overlaps) == {expected}, device
        assert all(map(torch.equal, results, others))


def test_a_build_of_older_ptx_does_not_overlap_on_a_new_card():
    """The code decides, not the card."""
    cuda_on_ptx.set_edit(lambda text: text.replace(".target sm_90", ".target sm_89"))
    assert not any(forward_and_backward(of_many_kernels(), new_device(major=9))[1])


def test_every_kernel_may_have_all_shared_memory_and_prefers_it_to_the_cache():
    """Whatever its first launch needs: threads whose launches need more and less may ask in any order, and no
    multiprocessor is divided anew between two kernels."""
    small, p = new_device(**RTX_4090), of_many_kernels()
    for device, most in ((0, 163 << 10), (1, 227 << 10), (small, RTX_4090["shared_per_block"])):
        _, launches = launched(p, device)
        assert {launch["granted"] for launch in launches} == {most}
        assert {launch["carveout"] for launch in launches} == {100}
        assert min(launch["shared_bytes"] for launch in launches) == 0


def test_memory_that_is_touched_before_the_wait_is_a_race():
    cuda_on_ptx.set_edit(lambda text: text.replace("griddepcontrol.wait;", ""))
    assert "without griddepcontrol.wait, and the kernel before this one may still run" in failure(problem(), 1)
    forward(problem(), 0)  # kernels that start in order need no wait


def test_every_kernel_waits_first_and_lets_the_next_one_start():
    seen = []
    cuda_on_ptx.set_edit(lambda text: seen.append(text) or text)
    for r in (16, 32, 64):
        forward(problem(r=r), 1)
    for text in seen:
        kernels = re.split(r"\.entry ", text)[1:]
        assert kernels
        for body in kernels:
            name = body.split("(")[0]
            first = re.search(r"\b(griddepcontrol\.\w+|(?:ld|st)\.global|cp\.async)", body)[0]
            assert first == "griddepcontrol.wait", name
            assert body.count("griddepcontrol.wait;") == body.count("griddepcontrol.launch_dependents;") == 1, name


@pytest.mark.parametrize("version, expected", [(12020, False), (12030, True)])
def test_a_driver_that_cannot_capture_overlaps_gets_none(kept_allocations, version, expected):
    p, device = of_many_kernels(), new_device(major=9)
    runtime.install_driver(version, False)
    runtime.begin_capture(7)
    captured, _ = forward_and_backward(p, device, 7)
    graph = runtime.end_capture()
    direct, overlaps = forward_and_backward(p, device)
    assert set(overlaps) == {expected}
    graph.replay()
    assert {launch["overlaps"] for launch in cuda_on_ptx.take_launches()} == {expected}
    assert all(map(torch.equal, captured, direct))


def test_a_device_that_refuses_overlaps_is_asked_once_for_each_kernel():
    p, device = of_many_kernels(), new_device(major=9)
    runtime.set_overlaps(False)
    results, overlaps = forward_and_backward(p, device)
    assert not any(overlaps) and runtime.last_error() == "cudaSuccess"
    before = runtime.calls("cudaLaunchKernelExC")
    others, overlaps = forward_and_backward(p, device)
    assert runtime.calls("cudaLaunchKernelExC") == before + len(overlaps)
    assert all(map(torch.equal, results, others))
