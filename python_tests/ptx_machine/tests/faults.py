"""Faults to plant in PTX: which lines each may change, and into what. Both compilers' spelling is understood.

Some changes change nothing, and are no faults. Four rules leave them out:

- A synchronization is only touched where a run of the unchanged kernels could not do without it: the machine lists
  barriers that alone stand between two accesses of one place, waits and commits without which a copy or a product would
  be in flight when its place is accessed, fences that alone stand between a product and the write of its operand or an
  access of its registers, and what alone orders the accesses of two blocks; and of the waits those that one group more
  in flight would undo (``effective`` and ``exact_waits`` in python_tests/ptx_machine/machine.h). A commit is none of
  them if its group and the next one end at one wait, nor is a wait if another one does the same before the access.
- Any other change is tried with a probe in front of the line, which reports if the line is executed and its operands
  are such that the change makes a difference: a predicate that is false somewhere, a copy that is shorter than the
  whole, a value that is not representable.
- An instruction that loads, multiplies or converts, or stores to shared memory, is only touched if a result depends on
  what it gives: with another number in its place, the results are others. (Products of columns beyond the edge are
  computed and not stored, and a pipeline begins with tiles that short loops never come to.) Where
  the change is that masked lanes load, the number takes the place of what those lanes have.
- Zeros that a copy fills up with are only left out where a result depends on them: with other numbers in their place,
  the results are others. (Rows beyond the edge of a matrix may hold anything, if what comes of them is not stored, and
  of two operands whose columns end one may, if the other has zeros.)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

Lines = Callable[[str], str]

# Fails wherever it is executed: it reads a register that nothing has written.
_FAIL = "mov.b32 %probe, %probe;"
_ALWAYS = f"{{ .reg .b32 %probe; {_FAIL} }}"


def _is_executed(line: str) -> str:
    """By a lane whose predicate holds."""
    guard = re.search(r"@!?%p\d+", line)
    return f"{{ .reg .b32 %probe; {guard[0] if guard else ''} {_FAIL} }}"


@dataclass(frozen=True)
class Fault:
    name: str
    pattern: str  # of the lines
    change: Lines  # the line itself where the fault has no place in it
    probe: Lines | None = _is_executed  # None: a synchronization
    drops_zeros: bool = False
    needs: str = "effective"  # of a synchronization: which list of the machine has it

    def fits(self, line: str) -> bool:
        return bool(re.search(self.pattern, line)) and self.change(line) != line


def _removed(line: str) -> str:
    return ""


def _groups(line: str) -> list[str]:
    return re.findall(r"\{[^{}]*\}", line)


def _swapped(number: int, one: int, other: int) -> Lines:
    """Exchange two registers of the operand in the braces of the given number."""

    def change(line: str) -> str:
        found = list(re.finditer(r"\{([^{}]*)\}", line))
        if len(found) <= number:
            return line
        names = [name.strip() for name in found[number][1].split(",")]
        if len(names) <= other:
            return line
        names[one], names[other] = names[other], names[one]
        return line[: found[number].start()] + "{" + ", ".join(names) + "}" + line[found[number].end() :]

    return change


def _accumulators_swapped(line: str) -> str:
    """Of the result and, so that the sums stay apart, not of the operand that is added to."""
    return _swapped(0, 1, 2)(line)


def _gives_another_product(change: Lines) -> Lines:
    """Both products, the right one and the changed one, into registers of their own. (Where an operand is zero, as
    behind the last row, none makes a difference.)"""

    def probe(line: str) -> str:
        if "wgmma" in line:
            return _is_executed(line)
        _, _, _, c = [[name.strip() for name in group[1:-1].split(",")] for group in _groups(line)]
        right = re.sub(r"\{[^{}]*\}", "{%right0, %right1, %right2, %right3}", line, count=1)
        changed = change(right).replace("%right", "%other")
        if not changed:
            changed = " ".join(f"mov.b32 %other{i}, {name};" for i, name in enumerate(c))
        compared = " ".join(
            f"setp.ne.b32 %differs, %right{i}, %other{i}; @%differs {_FAIL}" for i in range(len(c))
        )  # fmt: skip
        registers = ".reg .b32 %probe; .reg .b32 %right<4>; .reg .b32 %other<4>; .reg .pred %differs;"
        return f"{{ {registers} {right} {changed} {compared} }}"

    return probe


def _product(name: str, pattern: str, change: Lines) -> Fault:
    return Fault(name, pattern, change, _gives_another_product(change))


def _transposed(line: str) -> str:
    return re.sub(r"\.x(\d)(\.trans)?\.", lambda m: f".x{m[1]}." if m[2] else f".x{m[1]}.trans.", line, count=1)


def _group_operand_transposed(line: str) -> str:
    """Flip the last flag of a wgmma of 16 bits, which says that B is transposed."""
    return re.sub(r"([01]);\s*$", lambda m: f"{1 - int(m[1])};", line)


def _shifted(offset: int, which: int = 0) -> Lines:
    """Move an address."""

    def change(line: str) -> str:
        found = list(re.finditer(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]", line))
        if len(found) <= which:
            return line
        m = found[which]
        return line[: m.start()] + f"[{m[1]}+{int(m[2] or 0) + offset}]" + line[m.end() :]

    return change


def _half_a_copy(line: str) -> str:
    return re.sub(r",\s*(0x10|16|0x8|8|0x4|4),\s*%r\d+;", lambda m: f", {m[1]}, {int(m[1], 0) // 2};", line)


def _no_zero_fill(line: str) -> str:
    return re.sub(r",\s*(0x10|16|0x8|8|0x4|4),\s*%r\d+;", lambda m: f", {m[1]}, {m[1]};", line)


def _is_short(line: str) -> str:
    size, register = re.search(r",\s*(\w+),\s*(%r\d+);", line).groups()
    return (
        f"{{ .reg .b32 %probe; .reg .pred %short; setp.ne.s32 %short, {register}, {int(size, 0)}; @%short {_FAIL} }}"
    )  # fmt: skip


def _is_whole(line: str) -> str:
    """More than half of it is copied. (What lies beyond an edge is not copied at all.)"""
    found = re.search(r",\s*(\w+),\s*(%r\d+);", line)
    if not found:
        return _is_executed(line)
    half = int(found[1], 0) // 2
    return f"{{ .reg .b32 %probe; .reg .pred %whole; setp.gt.s32 %whole, {found[2]}, {half}; @%whole {_FAIL} }}"


def _waits_for_less(line: str) -> str:
    return re.sub(r"(wait_group\S*\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}", line)


def _relaxed(line: str) -> str:
    return re.sub(r"\.(acq_rel|acquire|release)\b", ".relaxed", line)


def _negated(line: str) -> str:
    return re.sub(r"@(!?)(%p\d+)", lambda m: f"@{'' if m[1] else '!'}{m[2]}", line, count=1)


def _unguarded(line: str) -> str:
    return re.sub(r"@!?%p\d+\s*", "", line, count=1)


def _is_false(line: str) -> str:
    guard = re.search(r"@!?%p\d+", _negated(line))[0]
    return f"{{ .reg .b32 %probe; {guard} {_FAIL} }}"


_CONVERSION = re.compile(r"cvt\.rn\.(b?f16)(x2)?\.f32\s+(%\w+),\s*(%\w+)(?:,\s*(%\w+))?;")


def _truncations(kind: str, sources: list[str]) -> str:
    """Bits that the type has no room for, dropped: what is left converts without rounding."""
    mask = -65536 if kind == "bf16" else -8192
    return " ".join(f"and.b32 %cut{i}, {source}, {mask};" for i, source in enumerate(sources))


def _truncated(line: str) -> str:
    kind, pair, to, *sources = _CONVERSION.search(line).groups()
    sources = [source for source in sources if source]
    cut = ", ".join(f"%cut{i}" for i in range(len(sources)))
    return f"{{ .reg .b32 %cut<2>; {_truncations(kind, sources)} cvt.rn.{kind}{pair or ''}.f32 {to}, {cut}; }}"


def _is_rounded(line: str) -> str:
    kind, _, _, one, other = _CONVERSION.search(line).groups()
    other = other or one
    return (
        "{ .reg .b32 %probe; .reg .b32 %cut<2>; .reg .b32 %half<2>; .reg .pred %rounded; "
        f"{_truncations(kind, [one, other])} cvt.rn.{kind}x2.f32 %half0, %cut0, %cut1; "
        f"cvt.rn.{kind}x2.f32 %half1, {one}, {other}; setp.ne.b32 %rounded, %half0, %half1; @%rounded {_FAIL} }}"
    )


def _halves_swapped(line: str) -> str:
    return re.sub(r"(%\w+),\s*(%\w+);", r"\2, \1;", line)


_OTHER = {"16": "16191", "32": "1061109567", "64": "1061109567"}  # by bits


def _stores_another(line: str) -> str | None:
    """Return the store to shared memory, of another number; None for another instruction."""
    found = re.search(r"st\.shared(?:\.v\d)?\.[a-z](\d+)\s+\[[^\]]*\],\s*(\{[^{}]*\}|%\w+);", line)
    if not found or found[1] not in _OTHER:
        return None
    bits, source = found[1], found[2]
    changed = line[: found.start(2)] + re.sub(r"%\w+", "%other", source) + line[found.end(2) :]
    return f"{{ .reg .b{bits} %other; mov.b{bits} %other, {_OTHER[bits]}; {changed} }}"


def overwritten(fault: Fault, line: str) -> str | None:
    """Return the line with another number in the place of what the instruction gives; None where it gives nothing, or
    later."""
    if fault.probe is not None and "st.shared" in line:
        return _stores_another(line)
    found = re.search(r"\b(ld\.|ldmatrix|mma\.sync|cvt\.rn)\S*\s+(\{[^{}]*\}|%\w+)", line)
    if fault.probe is None or not found or "wgmma" in line:
        return None
    guard = re.search(r"@!?%p\d+", line)
    lanes = "" if guard is None else guard[0]
    if fault.change is _unguarded:
        lanes = re.search(r"@!?%p\d+", _negated(line))[0]
    bits = {"rs": "16", "rd": "64"}
    moves = [
        f"{lanes} mov.b{bits.get(kind, '32')} %{kind}{number}, {_OTHER[bits.get(kind, '32')]};"
        for kind, number in re.findall(r"%([a-z]+)(\d+)", found[2])
    ]
    return f"{line} {' '.join(moves)}"


FAULTS = (
    Fault("barrier removed", r"\bbar\.sync", _removed, None),
    Fault("order of an atomic removed", r"\batom\S*\.(acq_rel|acquire|release)\b", _relaxed, None),
    Fault("fence of the device removed", r"\b(fence\.(acq_rel|sc)\.gpu|membar\.gl)\b", _removed, None),
    Fault("wait removed", r"cp\.async\.wait_group", _removed, None),
    Fault("wait for one group less", r"cp\.async\.wait_group", _waits_for_less, None, needs="exact_waits"),
    Fault("commit removed", r"cp\.async\.commit_group", _removed, None),
    Fault("wait for products removed", r"wgmma\.wait_group", _removed, None),
    Fault("wait for one group of products less", r"wgmma\.wait_group", _waits_for_less, None, needs="exact_waits"),
    Fault("commit of products removed", r"wgmma\.commit_group", _removed, None),
    Fault("fence of the async proxy removed", r"fence\.proxy\.async", _removed, None),
    Fault("fence of registers removed", r"wgmma\.fence", _removed, None),
    _product("A fragment swapped", r"\bmma\.sync", _swapped(1, 1, 2)),
    _product("B fragment swapped", r"\bmma\.sync", _swapped(2, 0, 1)),
    _product("accumulators swapped", r"\b(wg)?mma\.(sync|mma_async)", _accumulators_swapped),
    _product("product removed", r"\b(wg)?mma\.(sync|mma_async)", _removed),
    Fault("transposition wrong", r"(ld|st)matrix", _transposed),
    Fault("transposition of a group's B wrong", r"wgmma\.mma_async\S*\.b?f16\.b?f16\b", _group_operand_transposed),
    Fault("matrix 16 bytes off", r"(ld|st)matrix", _shifted(16)),
    Fault("matrix a row off", r"(ld|st)matrix", _shifted(128)),
    Fault("half a copy", r"cp\.async\.c[ag].*%r\d+;", _half_a_copy, _is_whole),
    Fault("zeros of a copy missing", r"cp\.async\.c[ag].*%r\d+;", _no_zero_fill, _is_short, drops_zeros=True),
    Fault("copy to another place", r"cp\.async\.c[ag]", _shifted(16, 0), _is_whole),
    Fault("copy from another place", r"cp\.async\.c[ag]", _shifted(16, 1), _is_whole),
    Fault("rounding dropped", _CONVERSION.pattern, _truncated, _is_rounded),
    Fault("packed halves swapped", r"cvt\.rn\.b?f16x2", _halves_swapped),
    Fault("shared load 16 bytes off", r"\bld\.shared", _shifted(16)),
    Fault("shared store a row off", r"\bst\.shared", _shifted(128)),
    Fault("global load 16 bytes off", r"\bld\.global", _shifted(16)),
    Fault("global store 16 bytes off", r"\bst\.global", _shifted(16)),
    Fault("predicate negated", r"@!?%p\d+\s+(ld|st)\.global", _negated, lambda line: _ALWAYS),
    Fault("predicate dropped", r"@!?%p\d+\s+(ld|st)\.global", _unguarded, _is_false),
)
