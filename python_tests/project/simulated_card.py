"""The card of tools/gpu_check.py on a machine without one: nvcc's kernels on the PTX machine, Triton's in its
interpreter or, for the conformance suite, compiled for the PTX machine; all calls small, and some of the tests."""

import ptx_cuda
import torch

from tools.gpu_right import Card

ptx_cuda.register()

CARD = Card(
    device="cpu",
    cuda=ptx_cuda.NAME,
    architecture="90-real",
    small=True,
    dtype=torch.float16,  # the interpreter has no bfloat16
    in_threads=(ptx_cuda.NAME,),  # the interpreter keeps the number of its program in a global variable
    selects={
        "cuda": "nvcc-sm_90-lone",
        "triton": "triton-sm_90-lone-keeps_the_bits_of_rows",
        "tests": "test_shapes and bf16 and (cuda_ptx or triton)",
    },
    variables={"triton": {"AFA_TEST_SIMULATED_GPU": "sm_90", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}},
)
