"""Cost of AFA-LoRA on the CPU: the layer against its frozen base, the branch alone, decoding, and scaling.

    python -m bench.bench_cpu [--quick] [--threads N] [--clock wall|cpu] [--only layer,branch,decode,scaling]

Times are medians of interleaved rounds in one process. The adapter tax is (layer - base) / base over forward and
backward; its floor is the larger of 6 M r (K + N) FLOP at the rate of the base GEMM, and of the bytes that any branch
has to move (x and y in the forward; dY, x and dX in the backward) at the measured copy bandwidth.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F

import afa_kernels as afa
from bench import common

SHAPES = ((2048, 2048, 2048, 16), (4096, 1024, 4096, 16), (512, 4096, 4096, 64))
DECODE = ((1, 4096, 4096, 16), (4, 4096, 4096, 16), (16, 4096, 4096, 16))
ALPHA_T = 0.5
SCALING = 2.0


class Problem:
    """Operands of one shape, and the ways to compute them."""

    def __init__(self, m: int, k: int, n: int, r: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.x = torch.randn(m, k).to(dtype).requires_grad_()
        self.weight = (torch.randn(n, k) / math.sqrt(k)).to(dtype)
        self.a = (torch.randn(r, k) / math.sqrt(k)).to(dtype).requires_grad_()
        self.b = (torch.randn(n, r) / math.sqrt(r)).to(dtype).requires_grad_()
        self.base = torch.randn(m, n).to(dtype)
        self.dy = torch.randn(m, n).to(dtype)
        self.alpha_t = torch.tensor(ALPHA_T)
        self.compiled = torch.compile(self._eager_linear, dynamic=False)

    def _branch(self, x):
        z = F.linear(x, self.a)
        h = (1 - self.alpha_t.to(z.dtype)) * z + self.alpha_t.to(z.dtype) * F.silu(z)
        return SCALING * F.linear(h, self.b)

    def _eager_linear(self, x):
        return F.linear(x, self.weight) + self._branch(x)

    def _afa_linear(self, backend):
        return afa.afa_linear(self.x, self.weight, None, self.a, self.b, self.alpha_t, scaling=SCALING, backend=backend)

    def _afa_lora(self, backend):
        return afa.afa_lora(self.x, self.a, self.b, self.alpha_t, scaling=SCALING, base=self.base, backend=backend)

    def layers(self) -> dict:
        """Return forward functions of the whole layer by provider."""
        providers = {
            "base": lambda: F.linear(self.x, self.weight),
            "lora": self._peft(),
            "eager": lambda: self._eager_linear(self.x),
            "compiled": lambda: self.compiled(self.x),
            "composition": lambda: self._afa_linear("torch"),
            "afa": lambda: self._afa_linear(None),
        }
        return {name: forward for name, forward in providers.items() if forward is not None}

    def branches(self) -> dict:
        """Return forward functions of ``base + branch`` by provider."""
        return {
            "eager": lambda: self.base + self._branch(self.x),
            "composition": lambda: self._afa_lora("torch"),
            "afa": lambda: self._afa_lora(None),
            "cpu": lambda: self._afa_lora("cpu"),
        }

    def _peft(self):
        try:
            from peft.tuners.lora import Linear, LoraConfig
        except ImportError:
            return None
        n, k = self.weight.shape
        base = torch.nn.Linear(k, n, bias=False, dtype=self.weight.dtype)
        base.weight = torch.nn.Parameter(self.weight, requires_grad=False)
        r = self.a.shape[0]
        config = LoraConfig(r=r, lora_alpha=SCALING * r, init_lora_weights=False)
        layer = Linear(base, "default", config, r=r, lora_alpha=SCALING * r)
        layer.lora_A["default"].to(self.weight.dtype)
        layer.lora_B["default"].to(self.weight.dtype)
        return lambda: layer(self.x)

    def training_step(self, forward):
        """Return one forward and backward, with fresh gradients."""

        def step():
            self.x.grad = self.a.grad = self.b.grad = None
            forward().backward(self.dy)

        return step


def copy_bandwidth() -> float:
    """Return bytes per second of a large copy, reads and writes counted."""
    source = torch.ones(32 << 20)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def floor_ms(m, k, n, r, dtype, base_ms, bandwidth) -> float:
    rate = 4.0 * m * k * n / base_ms  # FLOP per ms of the frozen layer, forward and backward
    size = dtype.itemsize
    moved = size * m * ((k + 2 * n) + (n + 2 * k))  # y is read and written behind the base
    return max(6.0 * m * r * (k + n) / rate, moved / bandwidth * 1e3)


def bench_layer(args, dtypes) -> list[dict]:
    rows, bandwidth = [], copy_bandwidth()
    print(f"\nlayer, forward + backward, ms; copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    for dtype in dtypes:
        for shape in SHAPES:
            problem = Problem(*shape, dtype)
            layers = problem.layers()
            if args.quick:
                layers.pop("compiled")
            steps = {name: problem.training_step(forward) for name, forward in layers.items()}
            ms = common.interleaved(steps, args.rounds, args.clock)
            floor = floor_ms(*shape, dtype, ms["base"], bandwidth)
            tax = {name: (value - ms["base"]) / ms["base"] for name, value in ms.items() if name != "base"}
            row = {"bench": "layer", "dtype": str(dtype), "shape": shape, "ms": ms, "tax": tax}
            rows.append(row | {"floor_tax": floor / ms["base"]})
            print(_title(dtype, shape), "".join(f"{name} {value:.1f}  " for name, value in ms.items()))
            print(" " * 36, "".join(f"{name} {100 * value:+.1f}%  " for name, value in tax.items()), end="")
            print(f"floor +{100 * floor / ms['base']:.1f}%")
    return rows


def bench_branch(args, dtypes) -> list[dict]:
    rows = []
    print("\nbranch alone with base, forward + backward, ms")
    for dtype in dtypes:
        for shape in SHAPES:
            problem = Problem(*shape, dtype)
            steps = {name: problem.training_step(forward) for name, forward in problem.branches().items()}
            ms = common.interleaved(steps, args.rounds, args.clock, min_seconds=0.02)
            rows.append({"bench": "branch", "dtype": str(dtype), "shape": shape, "ms": ms})
            _print_ratios(_title(dtype, shape), ms)
    for other in ("eager", "composition"):
        logs = [math.log(row["ms"][other] / row["ms"]["afa"]) for row in rows]
        print(f"geometric mean against {other}: {math.exp(sum(logs) / len(logs)):.2f}x")
    return rows


def bench_decode(args, dtypes) -> list[dict]:
    rows = []
    print("\ndecoding, branch with base, forward without gradients, ms")
    for dtype in dtypes:
        for shape in DECODE:
            problem = Problem(*shape, dtype)
            with torch.no_grad():
                ms = common.interleaved(problem.branches(), 5 * args.rounds, args.clock, min_seconds=0.005)
            rows.append({"bench": "decode", "dtype": str(dtype), "shape": shape, "ms": ms})
            _print_ratios(_title(dtype, shape), ms)
    return rows


def bench_scaling(args, dtypes) -> list[dict]:
    rows = []
    print("\nscaling of the branch, forward + backward, ms")
    sizes = [(m, 512, 512, 16) for m in (256, 1024, 4096, 16384, 65536)]
    ranks = [(4096, 1024, 1024, r) for r in (8, 16, 32, 64, 128)]
    for dtype in dtypes:
        for shape in sizes + ranks:
            problem = Problem(*shape, dtype)
            steps = {"afa": problem.training_step(problem.branches()["afa"])}
            ms = common.interleaved(steps, args.rounds, args.clock, min_seconds=0.01)
            rows.append({"bench": "scaling", "dtype": str(dtype), "shape": shape, "ms": ms})
            per_token = 1e3 * ms["afa"] / shape[0]
            print(_title(dtype, shape), f"{ms['afa']:.2f} ms, {per_token:.3f} us per token")
    return rows


def _title(dtype, shape) -> str:
    return f"{str(dtype).removeprefix('torch.'):9}" + "".join(f"{size:6}" for size in shape) + " |"


def _print_ratios(title, ms) -> None:
    print(title, "".join(f"{name} {value:.3f} ({value / ms['afa']:.2f}x)  " for name, value in ms.items()))


BENCHES = {"layer": bench_layer, "branch": bench_branch, "decode": bench_decode, "scaling": bench_scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no torch.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=sorted(common.CLOCKS), default="wall")
    parser.add_argument("--only", default=",".join(BENCHES), help="comma-separated: " + ", ".join(BENCHES))
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated torch dtypes")
    args = parser.parse_args()
    args.rounds = 5 if args.quick else 15
    torch.set_num_threads(args.threads)
    dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    rows = []
    for name in args.only.split(","):
        rows += [row | {"clock": args.clock} for row in BENCHES[name](args, dtypes)]
    print("\nwritten to", common.write_results("cpu", rows))


if __name__ == "__main__":
    main()
