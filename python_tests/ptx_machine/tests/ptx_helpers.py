"""Small PTX kernels of one CTA, for the tests of the machine that executes them."""

import re
from collections.abc import Callable

import numpy as np

from afa_kernels import _ptx

EXECUTED: set[str] = set()  # words of all kernels that were launched, among them the names of their instructions

_BITS = {2: "b16", 4: "b32", 8: "b64"}
HEADER = """
.version 8.4
.target sm_90a
.address_size 64
"""


# The beginning of a kernel of 64 threads with an array ``tile`` of shared memory. %r1: this thread's word of it, %r2:
# that of the thread 32 further, %r3: of the next lane of the warp, %r4: this thread's 16 bytes of it. %rd8 and %rd9:
# this thread's word and 16 bytes of the first array in global memory.
PLACES = """
    mov.b32 %r9, tile;
    mad.lo.u32 %r1, %r0, 4, %r9;
    xor.b32 %r8, %r0, 32;
    mad.lo.u32 %r2, %r8, 4, %r9;
    xor.b32 %r8, %r0, 1;
    mad.lo.u32 %r3, %r8, 4, %r9;
    mad.lo.u32 %r4, %r0, 16, %r9;
    mad.wide.u32 %rd8, %r0, 4, %rd0;
    mad.wide.u32 %rd9, %r0, 16, %rd0;
"""


def kernel(body: str, *, parameters: int = 1, shared: int = 0, threads: int = 32, registers: str = "") -> str:
    """Return a module with kernel ``k``. Its parameters are pointers, in %rd0, %rd1, ...; %r0 is the thread."""
    names = ", ".join(f".param .u64 k_param_{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [k_param_{i}];" for i in range(parameters))
    array = f".shared .align 1024 .b8 tile[{shared}];" if shared else ""
    return f"""{HEADER}
.visible .entry k({names})
.reqntid {threads}
{{
    .reg .pred %p<40>;
    .reg .b16 %h<40>;
    .reg .b32 %r<200>;
    .reg .b64 %rd<100>;
    {registers}
    {array}
    {loads}
    mov.u32 %r0, %tid.x;
    {body}
    ret;
}}
"""


def launch(
    text: str, *arrays: np.ndarray, threads: int = 32, grid: int = 1, seed: int = 0, writable=True, **options
) -> dict:
    """Run kernel ``k`` on numpy arrays, each exactly one allocation."""
    EXECUTED.update(re.findall(r"[a-z][\w.:]*\w", text))
    parameters = np.array([a.ctypes.data for a in arrays], dtype=np.uint64).tobytes()
    allocations = [(a.ctypes.data, a.nbytes, writable, f"array {i}") for i, a in enumerate(arrays)]
    return _ptx.Module(text).launch("k", (grid, 1, 1), (threads, 1, 1), parameters, 0, allocations, seed, **options)


def per_lane(code: str, inputs: list[np.ndarray], outputs: list[np.dtype]) -> list[np.ndarray]:
    """Run ``code`` on every lane of a warp and return its results. Inputs are in {a0}, {a1}, ..., of which each has 32
    elements, results go to {d0}, {d1}, ...; a bool result is a predicate."""
    names, body, count = {}, [], 0
    arrays = [np.ascontiguousarray(a) for a in inputs]
    results = [np.zeros(32, dtype=np.uint32 if t is bool else t) for t in outputs]
    letter = {2: "%h", 4: "%r", 8: "%rd"}

    def register(size: int) -> str:
        nonlocal count
        count += 1
        return f"{letter[size]}{10 + count}"

    for i, array in enumerate(arrays):
        names[f"a{i}"] = register(array.itemsize)
        body.append(f"mad.wide.u32 %rd99, %r0, {array.itemsize}, %rd{i};")
        body.append(f"ld.global.{_BITS[array.itemsize]} {names[f'a{i}']}, [%rd99];")
    for i, result in enumerate(results):
        names[f"d{i}"] = f"%p{i}" if outputs[i] is bool else register(result.itemsize)
    body.append(code.format(**names))
    for i, result in enumerate(results):
        value = names[f"d{i}"]
        if outputs[i] is bool:
            body.append(f"selp.b32 %r5, 1, 0, {value};")
            value = "%r5"
        body.append(f"mad.wide.u32 %rd99, %r0, {result.itemsize}, %rd{len(arrays) + i};")
        body.append(f"st.global.{_BITS[result.itemsize]} [%rd99], {value};")
    launch(kernel("\n".join(body), parameters=len(arrays) + len(results)), *arrays, *results)
    return [r.astype(bool) if t is bool else r for r, t in zip(results, outputs, strict=True)]


def comments(lines: list[str], numbers: list[int]) -> list[str]:
    """Return what is written behind some lines of a text, which are counted from 1."""
    return [lines[number - 1].partition("//")[2].strip() for number in numbers]


def changed(text: str, comment: str, change: Callable[[str], str]) -> str:
    """Return a text with the line changed that has a comment."""
    return "\n".join(change(line) if line.endswith(f"// {comment}") else line for line in text.splitlines())


def one_less(line: str) -> str:
    """Return a wait that leaves one group more in flight."""
    return re.sub(r"(wait_group\S*) (\d)", lambda m: f"{m[1]} {int(m[2]) + 1}", line)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
}  # fmt: skip
_RANDOM = np.random.default_rng(4)


def bits(dtype, *edges) -> np.ndarray:
    """Return 32 values: the edges of the type, some given ones, and random bits."""
    size = np.dtype(dtype).itemsize
    integer = np.dtype(f"u{size}")
    ends = [0, 1, 2, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, *edges]
    rest = _RANDOM.integers(0, np.iinfo(integer).max, 32 - len(ends), dtype=integer, endpoint=True)
    values = np.concatenate([np.array(ends, dtype=integer), rest])
    return _RANDOM.permutation(values).view(dtype)


def layout(shape, stride):
    """Return the offsets of a CuTe layout given as flat shapes and strides, first mode fastest."""
    offsets = np.zeros(shape[::-1], dtype=int)
    for axis, step in enumerate(stride):
        view = [1] * len(shape)
        view[len(shape) - 1 - axis] = shape[axis]
        offsets = offsets + np.arange(shape[axis]).reshape(view) * step
    return offsets.reshape(-1)
