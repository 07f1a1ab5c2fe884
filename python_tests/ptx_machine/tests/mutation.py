"""Plant faults in compiled PTX, one at a time, and show that the machine or the results tell each.

``python python_tests/ptx_machine/tests/mutation.py nvcc-sm_80 --count 72``: kernels of one compiler for one
architecture; kernels and kinds of faults take turns, places are drawn. What a fault is, and what changes nothing and is
none, says faults.py. A fault that nothing tells is printed with its line, and the exit status is 1, as it is if a
kernel got none of as many faults as there are kernels. The last line holds the figures as JSON.
"""

import argparse
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: it compiles
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from compilers import Kernel, Results, compiler  # noqa: E402
from faults import FAULTS, Fault, overwritten  # noqa: E402

from afa_kernels import _ptx  # noqa: E402

TRIES = 8  # places that are probed for one fault


class Planter:
    def __init__(self, where, seed: int):
        self.where, self.draw = where, random.Random(seed)
        self.right: dict[int, Results] = {}

    def outcome(self, kernel: Kernel, place: int, line: str) -> Results | str:
        """Return the results with one line changed, or what the machine reports."""
        lines = kernel.text.splitlines()
        lines[place] = line
        text = "\n".join(lines)
        _ptx.Module(text)  # a change that is not PTX would be no fault but a mistake of this file
        self.where.install(kernel, text)
        try:
            return kernel.results()
        except RuntimeError as error:
            return str(error)
        finally:
            self.where.install(None)

    def places(self, kernel: Kernel, fault: Fault) -> list[int]:
        lines = kernel.text.splitlines()
        found = [i for i in range(kernel.first, kernel.last) if fault.fits(lines[i])]
        return found if fault.probe else [i for i in found if i in kernel.needed[fault.needs]]

    def place(self, kernel: Kernel, fault: Fault) -> int | None:
        """Draw a place where the fault makes a difference to what the instruction does."""
        candidates = self.places(kernel, fault)
        self.draw.shuffle(candidates)
        if fault.probe is None:
            return candidates[0] if candidates else None
        for place in candidates[:TRIES]:
            line = kernel.text.splitlines()[place]
            told = self.outcome(kernel, place, f"{fault.probe(line)} {line}")
            if isinstance(told, str):
                if "%probe" not in told:
                    raise RuntimeError(f"a probe changes {kernel.name}, line {place + 1}: {told}")
                if self.matters(kernel, fault, place):
                    return place
        return None

    def matters(self, kernel: Kernel, fault: Fault, place: int) -> bool:
        """Whether a result depends on what the instruction gives."""
        if fault.drops_zeros:
            return self.needs_zeros(kernel, place)
        other = overwritten(fault, kernel.text.splitlines()[place])
        if other is None:
            return True
        told = self.outcome(kernel, place, other)
        return isinstance(told, str) or not same(told, self.results(kernel))

    def needs_zeros(self, kernel: Kernel, place: int) -> bool:
        """Whether a result depends on the zeros that a copy fills up with."""
        self.where.leave_unfilled(kernel, place)
        try:
            return not same(kernel.results(), self.results(kernel))
        finally:
            self.where.leave_unfilled(kernel, None)

    def results(self, kernel: Kernel) -> Results:
        """Return the results of the unchanged kernel."""
        if id(kernel) not in self.right:
            self.right[id(kernel)] = kernel.results()
        return self.right[id(kernel)]

    def is_told(self, kernel: Kernel, fault: Fault, place: int) -> str:
        """Return what tells the fault, 'report' or 'result', or an empty string."""
        wrong = self.outcome(kernel, place, fault.change(kernel.text.splitlines()[place]))
        if isinstance(wrong, str):
            return "report"
        return "" if same(self.results(kernel), wrong) else "result"


def same(left: Results, right: Results) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="nvcc-sm_80, nvcc-sm_90, triton-sm_80 or triton-sm_90")
    parser.add_argument("--count", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # several of these processes run side by side
    with compiler(arguments.target) as where:
        kernels = where.kernels()
        planter = Planter(where, arguments.seed)
        pairs = [(k, f) for k in kernels for f in FAULTS if planter.places(k, f)]
        planter.draw.shuffle(pairs)
        of_kernel: Counter = Counter({kernel.name: 0 for kernel in kernels})
        of_fault: Counter = Counter()
        tellers: Counter = Counter()
        silent = 0
        while pairs and of_fault.total() < arguments.count:
            # The kernel with the fewest faults so far, and of its faults the rarest.
            kernel, fault = pair = min(pairs, key=lambda p: (of_kernel[p[0].name], of_fault[p[1].name]))
            pairs.remove(pair)
            place = planter.place(kernel, fault)
            if place is None:
                continue
            of_kernel[kernel.name] += 1
            of_fault[fault.name] += 1
            teller = planter.is_told(kernel, fault, place)
            tellers[teller] += 1
            if not teller:
                silent += 1
                line = kernel.text.splitlines()[place].strip()
                print(f"NOT TOLD  {fault.name}: {kernel.name}, line {place + 1}: {line[:100]}", flush=True)
    bare = [name for name, count in of_kernel.items() if count == 0 and arguments.count >= len(of_kernel)]
    for name in bare:
        print(f"NO FAULT  in {name}", flush=True)
    figures = {
        "planted": of_fault.total(), "caught": of_fault.total() - silent, "by report": tellers["report"],
        "mutated kernels": len(of_kernel), "kinds": len(of_fault),
    }  # fmt: skip
    print(json.dumps(figures))
    return bool(silent or bare)


if __name__ == "__main__":
    sys.exit(main())
