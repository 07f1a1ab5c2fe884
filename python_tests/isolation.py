"""The environment that every test sees, whatever the caller's is. The conftest files import this before torch.

A run may choose the processor (``AFA_CPU_ISA``), the threads (``OMP_NUM_THREADS``), what may not be skipped
(``AFA_KERNELS_REQUIRE``) and whether Triton interprets (``TRITON_INTERPRET``). What else a shell, a launcher or a
notebook may have left goes, and nothing is asked of the network or kept in the caller's caches.
"""

import os
import tempfile

_CHANGES_RESULTS = ("AFA_KERNELS_BACKEND", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("ACCELERATE_", "FSDP_", "HF_", "TRANSFORMERS_", "TORCHELASTIC_")
_CACHES = tempfile.TemporaryDirectory(prefix="afa-tests-")  # until this process ends

for _name in list(os.environ):
    if _name in _CHANGES_RESULTS + _OF_A_LAUNCHER or _name.startswith(_PREFIXES):
        del os.environ[_name]
# Threads that wait sleep. Where others want the processor too, waiting actively made tests of tiny models take four
# times as long: 123 s, not 32 s, beside eight processes on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One cache of torch.compile for each ATEN_CPU_CAPABILITY, kept from run to run: torch 2.13 takes code out of it that
# was compiled for a wider processor, which then runs with the steps of the narrower one and gives wrong results.
_COMPILED = f"afa-tests-inductor-{getattr(os, 'getuid', int)()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"
# Processes that tests start inherit it.
os.environ |= {
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), _COMPILED),
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # torch 2.6 starts a pool of processes on import of its compiler
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": os.path.join(_CACHES.name, "huggingface"),
    "AFA_KERNELS_CACHE_DIR": os.path.join(_CACHES.name, "afa_kernels"),
}
