"""What was measured on what: versions, threads, instruction sets, the commit; and the two roofs."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import afa_kernels
from bench.shapes import DTYPES
from bench.timing import clock_of, quantile

_PACKAGES = ("torch", "triton", "peft", "torchtune", "torchao", "unsloth", "lorafusion", "numpy")
_COPY_BYTES = 1 << 27  # beyond the last-level cache of one socket
_GEMM_SIZES = {"cpu": (256, 2048), "cuda": (1024, 8192)}
_ROOF_ROUNDS = 7
_ROOF_CALL_MS = 100.0  # a GEMM that takes longer is large enough


def environment(device: str, **options: str) -> dict[str, object]:
    """Return the record that heads a file of results, with ``options`` of the timing among its fields."""
    record = {
        "kind": "environment",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "afa_kernels": afa_kernels.__version__,
        "backends": {name: status.reason or "available" for name, status in afa_kernels.backends().items()},
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "AFA_"))
        },
        "isa": {"torch": torch.backends.cpu.get_cpu_capability(), "afa_kernels": _isa()},
        "load": round(os.getloadavg()[0], 2),  # of the machine when the run began
        **options,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return record


def available_bytes(device: str) -> int:
    """Return the memory that is free on ``device``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
    return min(free, left_to_container(Path("/sys/fs/cgroup"), free))


def left_to_container(cgroup: Path, otherwise: int) -> int:
    """Return the bytes that the limit of a container leaves to it: /proc/meminfo is about the whole machine."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((cgroup / limit).read_text()) - int((cgroup / used).read_text()))
        except (OSError, ValueError):  # no such version of cgroups, or the limit is "max"
            continue
    return otherwise


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _isa() -> str:
    status = afa_kernels.backends().get("cpu")
    return str(status.details.get("isa", "")) if status else ""


def roofs(device: str, dtypes: list[str]) -> dict[str, object]:
    """Measure what this machine reaches: GB/s (read plus written) of a copy and GFLOP/s of a square
    GEMM in each dtype. The best of a few rounds: a roof is what is possible."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy_ms = _best(lambda: target.copy_(source), device)
    record = {
        "kind": "roof",
        "device": device,
        "copy_bytes": 2 * _COPY_BYTES,
        "copy_gb_s": 2 * _COPY_BYTES / copy_ms * 1e-6,
        "gemm_size": {},
        "gemm_gflop_s": {},
    }
    for name in dtypes:
        n, gflop_s = _square_gemm(device, DTYPES[name])
        record["gemm_size"][name], record["gemm_gflop_s"][name] = n, gflop_s
    return record


def _square_gemm(device: str, dtype: torch.dtype) -> tuple[int, float]:
    """Return the size and the GFLOP/s of the largest GEMM that is not slow: float16 may run at a
    hundredth of the rate of float32 on a CPU without instructions for it."""
    n, largest = _GEMM_SIZES[torch.device(device).type]
    while True:
        left = torch.randn(n, n, device=device).to(dtype)
        out = torch.empty_like(left)
        ms = _best(lambda left=left, out=out: torch.mm(left, left, out=out), device)
        if n >= largest or 8 * ms > _ROOF_CALL_MS:
            return n, 2 * n**3 / ms * 1e-6
        n *= 2


def _best(function, device: str) -> float:
    clock = clock_of(device)
    function()
    times = []
    for _ in range(_ROOF_ROUNDS):
        start = clock.mark()
        function()
        end = clock.mark()
        clock.wait()
        times.append(clock.milliseconds(start, end))
    return quantile(times, 0.0)
