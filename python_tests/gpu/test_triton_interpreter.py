"""The Triton kernels in Triton's interpreter: which of them run, and rows that lie far apart. conformance/ has the
numbers; what the interpreter cannot show is in test_triton_compile.py, test_triton_gpu.py and test_ptx_triton.py."""

from contextlib import nullcontext

import pytest
import torch
from conformance.layouts import placed
from conformance.problems import Problem

import afa_kernels as afa
from afa_kernels.backend.triton import backend

pytestmark = pytest.mark.usefixtures("interpreter")

# (M, K, N, r), and the kernels that one forward and one backward launch there.
PATHS = {
    "one pass": ((70, 72, 48, 16), "xa_phi_hb dy_pass dphi x_pass weight_grad"),
    "segments": ((20, 300, 130, 16), "project phi_hb dy_pass dphi x_pass weight_grad"),
    "padded rank": ((20, 40, 24, 3), "xa_phi_hb dy_pass dphi x_pass weight_grad"),
    "packed rank": ((20, 40, 24, 40), "pack xa_phi_hb pack dyb_dphi dy_pass x_pass weight_grad"),
    "two passes": ((70, 72, 48, 64), "xa_phi_hb dyb_dphi dy_pass x_pass weight_grad"),
    "two passes, segments": ((20, 300, 270, 128), "project phi_hb project dphi dy_pass x_pass weight_grad"),
    "chunks of several tiles": ((150, 40, 24, 16), "xa_phi_hb dy_pass dphi x_pass weight_grad"),
}


@pytest.mark.parametrize("path", PATHS)
def test_paths(path):
    from afa_kernels.backend.triton import configs, launch

    shape, names = PATHS[path][0], PATHS[path][1].split()
    problem = Problem.of(torch.float32, *shape)
    with launch.recording(configs.device_of(problem.x.device)) as launches:
        problem.run(backend.BACKEND)
    assert len(launches) == len(names), [entry.name for entry in launches]
    for entry, name in zip(launches, names, strict=True):
        assert entry.name.startswith(name), (entry.name, name)
    problem.check(problem.run(backend.BACKEND))


@pytest.mark.parametrize("inplace", [False, True], ids=["base", "inplace"])
def test_rows_too_far_apart_for_int32_are_copied(monkeypatch, inplace):
    from afa_kernels.backend.triton import launch, passes

    layouts = ["rows at odd places"] * 5
    problem = Problem.of(
        torch.float32, 20, 40, 24, 16, layouts=layouts, base="accumulated" if inplace else "matrix"
    )  # fmt: skip
    problem.x = placed(problem.x, layouts[0])
    want = problem.run(backend.BACKEND)
    near = launch.int32_offsets
    for module in (launch, passes):
        monkeypatch.setattr(module, "int32_offsets", lambda t, *rows: t.is_contiguous() and near(t))
    for what, t in problem.run(backend.BACKEND).items():
        torch.testing.assert_close(t, want[what])


def test_a_call_without_backward_needs_compiles_no_gradient():
    from afa_kernels.backend.triton import configs, launch

    problem = Problem.of(torch.float32, 33, 40, 24, 16)
    expected = {
        (False, False, False): (),
        (True, False, False): ("dy_pass", "dphi", "x_pass"),
        (False, False, True): ("dy_pass", "weight_gradients"),
        (False, True, False): ("dy_pass", "dphi", "x_pass", "weight_gradients"),
    }
    for needs, names in expected.items():
        needed = {name for name, one in zip(("dx", "da0", "db0"), needs, strict=True) if one}
        with launch.recording(configs.device_of(problem.x.device)) as launches:
            problem.backward(backend.BACKEND, {"z0": torch.empty(33, 16)}, needed)
        assert tuple(e.name.removesuffix("_kernel").removesuffix("_backward") for e in launches) == names


def test_identity_asked_for_by_name_is_the_linear_branch():
    problem = Problem.of(torch.float32, 33, 40, 24, 16)
    x, a, b, base = problem.x, problem.outputs[0].a, problem.outputs[0].b, problem.outputs[0].base
    got = afa.afa_lora(x, a, b, 0.0, base=base, scaling=2.0, backend="triton")
    torch.testing.assert_close(got, base + 2 * (x @ a.T) @ b.T)


def test_no_context_is_needed_for_the_cpu():
    assert isinstance(backend._on_device(torch.empty(1)), nullcontext)
