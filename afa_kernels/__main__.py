"""``python -m afa_kernels``: versions, devices, each backend, available or why not, and what was measured.
``--self-test`` also runs each of them against float64, and ``--tune`` measures (tune.py)."""

import argparse
import os
import platform
import sys
from importlib import metadata

import torch

import afa_kernels
from afa_kernels import self_test, tune
from afa_kernels.backend import measured
from afa_kernels.backend.choice import ENVIRONMENT_VARIABLE

_OPTIONAL_PACKAGES = ("triton", "transformers", "peft", "safetensors")


def _versions() -> str:
    found = [
        f"afa_kernels {afa_kernels.__version__}",
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    for package in _OPTIONAL_PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def _devices() -> list[str]:
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads of torch"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                f"cuda:{index}: {properties.name}, compute capability "
                f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
            )
    else:
        built = torch.version.cuda or torch.version.hip
        found.append(f"cuda: none ({'no device found' if built else 'torch was built without it'})")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found += [f"xpu:{i}: {torch.xpu.get_device_name(i)}" for i in range(torch.xpu.device_count())]
    return found


def _backends() -> list[str]:
    lines = []
    for name, status in afa_kernels.backends().items():
        state = "available" if status else f"not available: {status.reason}"
        details = ", ".join(f"{key}={value}" for key, value in status.details.items())
        lines.append(f"{name:<10} {state}" + (f" ({details})" if details else ""))
    return lines


def _measured() -> list[str]:
    """Return what was measured of each card, or why nothing is known."""
    found = []
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        for index in range(module.device_count() if module.is_available() else 0):
            device = torch.device(kind, index)
            entries, reason = measured.read(device)
            found.append(f"{device}: {reason or f'{len(entries)} layers, in {measured.file_of(device)}'}")
    return found or ["no card, so device, dtype and rank decide"]


def main(argv: list[str] | None = None) -> int:
    """Print the report and return the exit status. ``argv``: the arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m afa_kernels", description="what runs here, and why not the rest")
    parser.add_argument("--self-test", action="store_true", help="run every backend against float64, in seconds")
    tune.arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.tune is not None:
        return tune.main(arguments)
    print(_versions())
    print("devices:")
    for line in _devices():
        print(f"  {line}")
    print("backends, in the order of choice:")
    for line in _backends():
        print(f"  {line}")
    print("measured, by python -m afa_kernels --tune:")
    for line in _measured():
        print(f"  {line}")
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        print(f"{ENVIRONMENT_VARIABLE}={forced} asks for one backend")
    if arguments.self_test:
        print("self-test, against float64:")
        return self_test.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
