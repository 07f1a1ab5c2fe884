"""Plant faults in nvcc's PTX, one at a time, and show that the machine or the results tell each.

``python csrc/ptx/tests/mutation.py`` (``--count 100 --seed 1``): kernels and faults take turns, places are drawn. A
fault that nothing tells is printed with its line, and the exit status is 1.
"""

import argparse
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "python_tests"))

import ptx_cuda  # noqa: E402
from helpers import Problem  # noqa: E402

from afa_kernels import _cuda_on_ptx  # noqa: E402
from afa_kernels.backend import registry  # noqa: E402
from afa_kernels.backend.registry import Spec  # noqa: E402

Edit = Callable[[str], str]


def removed(line: str) -> str:
    return ""


def swapped_fragment(line: str) -> str:
    """Exchange the second and the third register of A."""
    head, a, rest = re.fullmatch(r"(.*?\}, \{)(.*?)(\}.*)", line).groups()
    a = a.split(", ")
    a[1], a[2] = a[2], a[1]
    return head + ", ".join(a) + rest


def swapped_accumulators(line: str) -> str:
    head, c, rest = re.fullmatch(r"(.*?\{)(.*?)(\}.*)", line).groups()
    c = c.split(", ")
    c[1], c[2] = c[2], c[1]
    return head + ", ".join(c) + rest


def transposed(line: str) -> str:
    return line.replace(".x4.trans.", ".x4.") if ".trans." in line else line.replace(".x4.", ".x4.trans.")


def shifted(line: str) -> str:
    """Move an address by 16 bytes."""
    return re.sub(r"\[(%\w+)(\+-?\d+)?\]", lambda m: f"[{m[1]}+{int(m[2] or 0) + 16}]", line, count=1)


def copies_half(line: str) -> str:
    return re.sub(r", 16, %r\d+;", ", 16, 8;", line)


def waits_for_less(line: str) -> str:
    return re.sub(r"wait_group (\d+)", lambda m: f"wait_group {int(m[1]) + 1}", line)


def swapped_pair(line: str) -> str:
    return re.sub(r"(%f\d+), (%f\d+);", r"\2, \1;", line)


# Name -> (the lines it may change, the change)
FAULTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "barrier removed": (r"bar\.sync", removed),
    # Not wait_group 0: most of these stand behind the last iteration, where only empty groups are left.
    "wait removed": (r"cp\.async\.wait_group [12]", removed),
    "wait for one group less": (r"cp\.async\.wait_group [12]", waits_for_less),
    "commit removed": (r"cp\.async\.commit_group", removed),
    "A fragment swapped": (r"mma\.sync", swapped_fragment),
    "accumulators swapped": (r"mma\.sync", swapped_accumulators),
    "product removed": (r"mma\.sync", removed),
    "transposition wrong": (r"ldmatrix", transposed),
    "matrix 16 bytes off": (r"ldmatrix", shifted),
    "half a copy": (r"cp\.async\.cg", copies_half),
    "packed halves swapped": (r"cvt\.rn\.b?f16x2", swapped_pair),
    "shared load 16 bytes off": (r"ld\.shared", shifted),
    "shared store 16 bytes off": (r"st\.shared", shifted),
    "global load 16 bytes off": (r"ld\.global", shifted),
    "global store 16 bytes off": (r"st\.global", shifted),
}


def entries(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each kernel's name and the range of its lines."""
    lines, start, name = text.splitlines(), None, ""
    for number, line in enumerate(lines):
        found = re.search(r"\.entry (\w+)", line)
        if found:
            name, start = found[1], number
        if line.startswith("}") and start is not None:
            yield name, start, number
            start = None


# Fails wherever it is executed: it reads a register that nothing has written.
PROBE = "{ .reg .b32 %probe; mov.b32 %probe, %probe; }"


def places(kernel: str, fault: str) -> list[int]:
    """Return the lines of a kernel that a fault may change."""
    pattern, change = FAULTS[fault]
    found: list[int] = []

    def look(text: str) -> str:
        lines = text.splitlines()
        for name, first, last in entries(text):
            if name == kernel:
                found.extend(
                    i for i in range(first, last) if re.search(pattern, lines[i]) and change(lines[i]) != lines[i]
                )
        return text

    outcome(kernel, look)
    return found


def edited(kernel: str, place: int, change: Callable[[str], str]) -> Edit:
    """Return an edit of one line of the text that holds a kernel."""

    def edit(text: str) -> str:
        if f".entry {kernel}(" not in text:
            return text
        lines = text.splitlines()
        lines[place] = change(lines[place])
        return "\n".join(lines)

    return edit


def results(kernel: str) -> list[torch.Tensor]:
    """Run problems that reach a kernel: of its dtype and rank, in one pass and split, with a mask and without, with
    full tiles of rows and with one that is not."""
    dtype = torch.bfloat16 if "Bf16" in kernel else torch.float16
    mark = re.search(r"ELi(\d+)", kernel)
    rank = int(mark[1]) if mark else 20
    backend, found = registry.get(ptx_cuda.NAME), []
    alpha_t, seed = torch.tensor(0.3), torch.tensor(5)
    adapter = torch.float32 if "pack" in kernel else dtype
    for shape, dropout in (((64, 72, 80), 0), ((75, 136, 264), 77), ((64, 904, 136), 0)):
        torch.manual_seed(1)
        p = Problem.random(*shape, rank, dtype, adapter_dtype=adapter)
        spec = Spec("silu", 1.5, dropout)
        y = torch.full_like(p.base, torch.nan)
        operands = (p.x, p.lora_a, p.lora_b)
        z = backend.forward(*operands, alpha_t, seed, spec, base=p.base, out=y, save_z=dropout == 0)
        gradients = backend.backward(p.dy, *operands, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True)
        found += [y, *gradients]
    return found


def outcome(kernel: str, edit: Edit) -> list[torch.Tensor] | None:
    """Return the results with edited PTX; None where the machine reports something."""
    _cuda_on_ptx.set_edit(edit)
    try:
        return results(kernel)
    except RuntimeError:
        return None
    finally:
        _cuda_on_ptx.set_edit(lambda text: text)


def executed_place(kernel: str, fault: str, draw: random.Random) -> int | None:
    """Return a place for a fault that the problems reach: other rings and edges than theirs are dead code to them."""
    candidates = places(kernel, fault)
    draw.shuffle(candidates)
    for place in candidates[:12]:
        if outcome(kernel, edited(kernel, place, lambda line: PROBE + line)) is None:
            return place
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ptx_cuda.register()
    kernels = [name for name in _cuda_on_ptx.kernel_names() if "primitive_check" not in name]
    draw = random.Random(arguments.seed)
    plan = [(kernels[i % len(kernels)], list(FAULTS)[i % len(FAULTS)]) for i in range(2 * arguments.count)]
    right: dict[str, list[torch.Tensor]] = {}
    planted, reports, silent = 0, 0, []
    for kernel, fault in plan:
        if planted == arguments.count:
            break
        if kernel not in right:
            right[kernel] = results(kernel)
        place = executed_place(kernel, fault, draw)
        if place is None:
            continue  # the kernel has no such instruction, or the problems do not reach it
        planted += 1
        wrong = outcome(kernel, edited(kernel, place, FAULTS[fault][1]))
        if wrong is None:
            reports += 1
        elif all(torch.equal(a, b) for a, b in zip(right[kernel], wrong, strict=True)):
            silent.append((kernel, fault, place))
            print(f"NOT TOLD  {fault}: {kernel}, line {place + 1}", flush=True)
    caught = planted - len(silent)
    kinds = f"{reports} by a report, {caught - reports} by a result"
    print(f"{planted} planted in {len(right)} kernels, {caught} told: {kinds}")
    return bool(silent)


if __name__ == "__main__":
    sys.exit(main())
