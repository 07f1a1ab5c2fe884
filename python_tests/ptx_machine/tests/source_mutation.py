"""Plant the faults of mutants.py in the source of the CUDA kernels, and show that the machine or the results tell each.

``python python_tests/ptx_machine/tests/source_mutation.py --first 0 --count 14``: each fault is compiled by nvcc to PTX
for one architecture, one file of kernels after the other until the fault is told. Calls that reach these kernels run on
what comes out. A fault that nothing tells is printed, and the exit status is 1, as it is if a change does not fit the
source. The last line holds the figures as JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: it compiles
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from compilers import Nvcc, Results, entries  # noqa: E402
from conformance.problems import Problem  # noqa: E402
from mutants import MUTANTS, Mutant  # noqa: E402
from mutation import same  # noqa: E402
from ptx_cuda import _cuda_on_ptx, kernels  # noqa: E402

CSRC = Path(__file__).resolve().parents[3] / "csrc"
KERNELS = "cuda/kernels"
# The files that include a header; what is in no list is in all of them.
RANKS, SMALL = ("rank16.cu", "rank32.cu", "rank64.cu"), ("small.cu",)
USERS = {"forward.cuh": RANKS, "backward.cuh": RANKS, "outer.cuh": RANKS, "pack.cuh": SMALL, "reduce.cuh": SMALL}
NVCC = [os.environ.get("CUDACXX", "nvcc"), "-ptx", "-arch=compute_80", "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo"]


def changed(mutant: Mutant) -> str:
    """Return the header with the fault in it."""
    text = (CSRC / KERNELS / mutant.file).read_text()
    # The formatter may break a line anywhere: white space stands for any white space.
    pattern = r"\s+".join(re.escape(word) for word in mutant.old.split())
    places = list(re.finditer(pattern, text))
    if mutant.nth >= len(places):
        raise LookupError(f"{mutant.file} does not contain, {mutant.nth + 1} times, {mutant.old!r}")
    place = places[mutant.nth]
    return text[: place.start()] + mutant.new + text[place.end() :]


def compiled(file: str, mutant: Mutant | None = None) -> str:
    """Return the PTX of a file of kernels, where a fault stands in front of the header that it changes."""
    with tempfile.TemporaryDirectory() as folder:
        if mutant is not None:
            header = Path(folder) / KERNELS / mutant.file
            header.parent.mkdir(parents=True)
            header.write_text(changed(mutant))
        out = Path(folder) / "kernels.ptx"
        command = [*NVCC, f"-I{folder}", f"-I{CSRC}", str(CSRC / KERNELS / file), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return out.read_text()


class Case:
    """A forward and a backward of one layer, or of several that share x."""

    def __init__(self, m, k, n, r, dtype=torch.bfloat16, weights=None, dropout=0, row=False, **limits):
        self.shape, self.limits = (m, k, n, r), limits
        self.right: Results = []
        torch.manual_seed(1)
        options = {} if isinstance(n, tuple) else {"dropout": dropout, "base": "row" if row else "matrix"}
        if isinstance(n, int) or weights is not None:
            options["weights"] = weights or dtype
        self.problem = Problem.of(dtype, m, k, n, r, **options)

    def run(self) -> Results:
        _cuda_on_ptx.runtime.set_limits(**self.limits)
        return list(self.problem.run(kernels).values())


def cases() -> list[Case]:
    """One per path through the kernels, the quick ones first."""
    f16, f32 = torch.float16, torch.float32
    return [
        Case(1, 8, 8, 1),  # one row, one vector, one rank
        Case(130, 264, 136, 16),  # one pass, operands read in place, three tiles of rows
        Case(90, 136, 136, 13, f16, dropout=60),
        Case(140, 200, 136, 64, f16, dropout=30),
        Case(70, 712, 72, 24, dropout=77),
        Case(90, 136, (72, 136), (16, 13)),  # one pass for both
        Case(130, 136, (264, 72, 72), (16, 16, 16)),
        Case(70, 264, (136, 264), (5, 8), weights=f32),
        # More tiles of rows in a chunk than there are stages in any ring; three rounds with one chunk each.
        *(Case(330, 72, 72, r, dropout=90 * (r != 32), chunk_limit=1) for r in (16, 32, 64)),
        *(Case(330, 72, 72, r, f16, chunk_limit=1, round_limit=128) for r in (16, 64)),
        Case(70, 712, 520, 16, weights=f32),  # split forward, two slabs of dy, more tiles than stages
        Case(70, 136, 456, 60, weights=f32, row=True),
        Case(200, 264, 520, 32, weights=f32, row=True),
        Case(90, 392, 200, 20, f16, weights=f32),
        Case(330, 136, 520, 64),  # dh by its segments
        Case(70, 712, (8, 584, 136), (3, 17, 16), weights=f32),
        Case(330, 72, (72, 72, 136), (16, 8, 32), round_limit=128),
        # Three rounds of rows, the last one shorter, with two chunks each.
        *(Case(650, 72, 136, r, dropout=90 * (r != 64), round_limit=256) for r in (16, 32, 64)),
        # More tiles than there are stages: of x in a segment; of x and of y where one block makes both.
        Case(20, 4104, 72, 16),
        Case(6100, 648, 648, 16),
    ]


class Planter:
    def __init__(self):
        self.cases = cases()
        self.reached: dict[str, list[Case]] = {}  # by kernel
        for case in self.cases:
            _cuda_on_ptx.take_launches()
            case.right = case.run()
            for kernel in {launch["kernel"] for launch in _cuda_on_ptx.take_launches()}:
                self.reached.setdefault(kernel, []).append(case)

    def told(self, text: str) -> tuple[str, str]:
        """Return what tells that these kernels are wrong, 'report' or 'result', with details; or two empty strings."""
        names = {name for name, *_ in entries(text)}

        def edit(old: str) -> str:
            is_same = {name for name, *_ in entries(old)} == names and ".target sm_80" in old
            return text if is_same else old

        _cuda_on_ptx.set_edit(edit)
        try:
            for case in self.cases:
                if any(case in self.reached.get(name, ()) for name in names):
                    try:
                        if not same(case.run(), case.right):
                            return "result", str(case.shape)
                    except RuntimeError as error:
                        return "report", str(error).splitlines()[0]
        finally:
            _cuda_on_ptx.set_edit(lambda old: old)
        return "", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the number of the first fault")
    parser.add_argument("--count", type=int, default=len(MUTANTS))
    parser.add_argument("--step", type=int, default=1, help="of every so many, one")
    parser.add_argument(
        "--sound", action="store_true", help="compile the unchanged kernels too, which must give the same"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # several of these processes run side by side
    tellers: Counter = Counter()
    with Nvcc("sm_80"):
        planter = Planter()
        if arguments.sound:
            for file in (*RANKS, *SMALL):
                teller, what = planter.told(compiled(file))
                if teller:
                    print(f"UNCHANGED  {file}: {what}", flush=True)
                    return 1
        for mutant in MUTANTS[arguments.first : arguments.first + arguments.count : arguments.step]:
            for file in USERS.get(mutant.file, (*RANKS, *SMALL)):
                teller, what = planter.told(compiled(file, mutant))
                if teller:
                    break
            tellers[teller] += 1
            print(f"{teller or 'NOT TOLD':8}  {mutant.kind}: {mutant.what} ({file}): {what[:120]}", flush=True)
    figures = {
        "planted in the source": tellers.total(),
        "told": tellers.total() - tellers[""],
        "report": tellers["report"],
    }
    print(json.dumps(figures))
    return bool(tellers[""])


if __name__ == "__main__":
    sys.exit(main())
