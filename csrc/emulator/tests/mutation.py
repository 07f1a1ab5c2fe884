"""Mutation proof: plants faults in the real kernels and shows that the emulator notices each one.

    python csrc/emulator/tests/mutation.py [--quick] [--list]

A mutant is a textual change to a copy of csrc. The driver runs it in the plain build and, where
that one is content, under ThreadSanitizer: a race whose numbers came out right is a fault all the
same. Prints caught/planted; exit status 1 if one escapes, or if a change no longer fits the source.
"""

import argparse
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import build

CASES = "31"
QUICK = 7  # every so many mutants in the quick form


class Mutant(NamedTuple):
    kind: str
    what: str
    file: str  # under csrc/cuda
    old: str
    new: str
    nth: int = 0  # which occurrence of `old`


MUTANTS = (
    Mutant(
        "barrier removed",
        "project: before the next tile",
        "forward.cuh",
        "block_sync();  // the tile is",
        "// the tile is",
    ),
    Mutant(
        "barrier removed",
        "forward: before the rings are reused",
        "forward.cuh",
        "block_sync();  // the rings",
        "// the rings",
    ),
    Mutant(
        "barrier removed",
        "emit_columns",
        "forward.cuh",
        "member.b, col0, 0); block_sync();",
        "member.b, col0, 0);",
    ),
    Mutant(
        "barrier removed",
        "dy kernel",
        "backward.cuh",
        "wait_oldest(p.stages); block_sync();",
        "wait_oldest(p.stages);",
        0,
    ),
    Mutant(
        "barrier removed",
        "dB",
        "db.cuh",
        "wait_oldest(p.stages); block_sync();",
        "wait_oldest(p.stages);",
    ),
    Mutant(
        "barrier removed",
        "x kernel",
        "backward.cuh",
        "wait_oldest(p.stages); block_sync();",
        "wait_oldest(p.stages);",
        1,
    ),
    Mutant(
        "barrier removed",
        "project_dy: before dh takes the place of dy",
        "backward.cuh",
        "block_sync();  // the ring has been read",
        "// the ring has been read",
    ),
    Mutant("warp barrier removed", "project: after dropout", "forward.cuh", "p.w, true); warp_sync();", "p.w, true);"),
    Mutant("warp barrier removed", "forward: z to h", "forward.cuh", "warp_sync(); emit_columns", "emit_columns"),
    Mutant(
        "warp barrier removed",
        "x kernel: x read before dx is written",
        "backward.cuh",
        "warp_sync();  // all lanes",
        "// all lanes",
    ),
    Mutant(
        "warp barrier removed",
        "x kernel: dx written before it is stored",
        "backward.cuh",
        "warp_sync(); constexpr int kVectors",
        "constexpr int kVectors",
    ),
    Mutant(
        "warp barrier removed",
        "project_dy: dh written before dz is made of it",
        "dz.cuh",
        "} warp_sync(); AFA_ROLLED",
        "} AFA_ROLLED",
    ),
    Mutant(
        "warp barrier removed",
        "project_dy: dh read before the next columns of it are written",
        "dz.cuh",
        "warp_sync();  // all lanes",
        "// all lanes",
    ),
    Mutant("wait removed", "project", "forward.cuh", "wait_oldest(p.stages);", ""),
    Mutant("wait too short", "ring of five", "tile.cuh", "copy_wait<3>();", "copy_wait<4>();"),
    Mutant("wait too short", "ring of three", "tile.cuh", "copy_wait<1>();", "copy_wait<2>();"),
    Mutant("commit removed", "project", "forward.cuh", "copy_commit();", "", 0),
    Mutant("commit removed", "x kernel", "backward.cuh", "copy_commit();", "", 1),
    Mutant(
        "slot overwritten while read",
        "project",
        "forward.cuh",
        "load(t + ahead, slot == 0 ? ahead : slot - 1);",
        "load(t + ahead, slot);",
        0,
    ),
    Mutant("slot overwritten while read", "dy kernel: one tile of h", "backward.cuh", "(t & 1) * Tile::kH", "0"),
    Mutant(
        "slot overwritten while read",
        "dy kernel: its tiles of dy",
        "backward.cuh",
        "c + ahead, slot == 0 ? ahead : slot - 1);",
        "c + ahead, slot);",
    ),
    Mutant(
        "tile mistaken",
        "dy kernel: rows of B",
        "backward.cuh",
        "b_slab + c * Tile::kDepth * kNarrowPitch",
        "b_slab",
    ),
    Mutant(
        "tile mistaken",
        "dy kernel: columns of dy",
        "backward.cuh",
        "col0 + tile % Tile::kTiles * Tile::kDepth, n",
        "col0, n",
    ),
    Mutant(
        "tile mistaken",
        "dy kernel: columns of dB",
        "backward.cuh",
        "col0 + c * Tile::kDepth + warp_index()",
        "col0 + warp_index()",
    ),
    Mutant("edge mask removed", "rows of a tile", "tile.cuh", "col_valid && row0 + row < rows", "col_valid"),
    Mutant("edge mask removed", "columns of a tile", "tile.cuh", "col_valid && row0 + row < rows", "row0 + row < rows"),
    Mutant("edge mask removed", "rows of y", "forward.cuh", "row < rows && col < member.b.rows", "col < member.b.rows"),
    Mutant("edge mask removed", "columns of y", "forward.cuh", "row < rows && col < member.b.rows", "row < rows"),
    Mutant(
        "edge mask removed",
        "columns of dx",
        "backward.cuh",
        "row0 + row < row_end && col0 + col < p.w",
        "row0 + row < row_end",
    ),
    Mutant(
        "edge mask off by one",
        "rows of a partial product",
        "forward.cuh",
        "row + 8 * half < p.m",
        "row + 8 * half <= p.m",
    ),
    Mutant(
        "edge of the rows ignored",
        "dy kernel: last chunk",
        "backward.cuh",
        "row_begin + p.rows_per_chunk < p.m ? row_begin + p.rows_per_chunk : p.m",
        "row_begin + p.rows_per_chunk",
    ),
    Mutant(
        "rank mask removed",
        "z",
        "tile.cuh",
        "if (col < r) store_global(reinterpret_cast<uint32_t*>(p), pair);",
        "store_global(reinterpret_cast<uint32_t*>(p), pair);",
    ),
    Mutant(
        "fragment swapped",
        "project: halves of the second operand",
        "forward.cuh",
        "multiply_add<T>(acc[2 * j], a, b[0], b[1]);",
        "multiply_add<T>(acc[2 * j], a, b[1], b[0]);",
    ),
    Mutant(
        "fragment swapped",
        "matrices counted right first",
        "tile.cuh",
        "((lane_index() & 7) + ((lane_index() >> 4) << 3)) * kPitch",
        "(lane_index() & 15) * kPitch",
    ),
    Mutant(
        "fragment swapped",
        "columns of y in memory order",
        "tile.cuh",
        "return (row & ~31) | ((row >> 1 & 3) << 3) | ((row >> 3 & 3) << 1) | (row & 1);",
        "return row;",
    ),
    Mutant(
        "transposition forgotten",
        "dx: A",
        "backward.cuh",
        "load_matrices_transposed(a[k][j]",
        "load_matrices(a[k][j]",
    ),
    Mutant("accumulator not cleared", "project: of a segment", "forward.cuh", "acc[j][i] = 0.0f;", ""),
    Mutant(
        "accumulator not cleared",
        "project: of the sum of all segments",
        "forward.cuh",
        "total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0.0f;",
        "total[j][0] = total[j][1] = total[j][2] = 0.0f;",
    ),
    Mutant(
        "round forgotten",
        "partial results of the rounds before",
        "outer.cuh",
        "adds ? load_global(out) : Float2{0.0f, 0.0f}",
        "Float2{0.0f, 0.0f}",
    ),
    Mutant("round forgotten", "rows of the dropout mask", "tile.cuh", "dropout.first_row + row + r,", "row + r,"),
    Mutant(
        "edge off by one",
        "columns of a weight",
        "tile.cuh",
        "if (row >= w.rows || col >= w.cols)",
        "if (row >= w.rows || col > w.cols)",
    ),
    Mutant(
        "edge mask removed",
        "rows of a float32 weight",
        "tile.cuh",
        "valid = row0 + row(i) < w.rows && col0",
        "valid = col0",
    ),
    Mutant(
        "slot overwritten while read",
        "a float32 weight: one tile of T",
        "tile.cuh",
        "(rounded ? t & 1 : slot)",
        "(rounded ? 0 : slot)",
    ),
    Mutant("member mistaken", "the third for the second", "tile.cuh", "+ (index >= members[2].first)", ""),
    Mutant("member mistaken", "its columns of h", "forward.cuh", "pitch(R) + member.rank0 + k +", "pitch(R) + k +"),
    Mutant("member mistaken", "its columns of y", "forward.cuh", "t == first || t == member.first", "t == first"),
    Mutant("member mistaken", "depth of its product", "forward.cuh", "if (k > 0 && k >= depth)", "if (k > 0)"),
    Mutant("sum off by one", "partial results", "reduce.cuh", "first + i < count ?", "first + i + 1 < count ?"),
    Mutant(
        "sum off by one",
        "splits of z",
        "forward.cuh",
        "if (s < p.project.splits &&",
        "if (s + 1 < p.project.splits &&",
    ),
    Mutant("sum off by one", "dh in the x kernel", "dz.cuh", "valid && i < job.count", "valid && i + 1 < job.count"),
    Mutant("sum off by one", "chunks of dA", "slab_sums.cuh", "next < stored ?", "next + 1 < stored ?"),
    Mutant("sum off by one", "chunks of dB", "slab_sums.cuh", "next < stored; ++next", "next + 1 < stored; ++next"),
    Mutant(
        "ticket taken too early",
        "before the partial result is stored",
        "slab_sums.cuh",
        """store_outer<R, kSlice>(p.partial + chunk * size, da, 0, R, col, p.w, p.adds);
        if (p.sums.count == 0 || !is_last(p.sums, slab, threads)) return;""",
        """const bool last = p.sums.count > 0 && is_last(p.sums, slab, threads);
        store_outer<R, kSlice>(p.partial + chunk * size, da, 0, R, col, p.w, p.adds);
        if (!last) return;""",
    ),
    Mutant("ticket mistaken", "of the last but one", "slab_sums.cuh", "(sums.blocks - 1)", "(sums.blocks - 2)"),
    Mutant("ticket mistaken", "of none", "slab_sums.cuh", "(sums.blocks - 1)", "(sums.blocks)"),
    Mutant(
        "ticket mistaken",
        "of the neighbour too",
        "slab_sums.cuh",
        "threads + thread_index();",
        "threads + thread_index() / 2;",
    ),
    Mutant(
        "counters not zeroed",
        "dy kernel",
        "backward.cuh",
        "clear<DyTile<R>::kThreads>(p.arrived, p.arrived_count);",
        ";",
    ),
    Mutant(
        "counters not zeroed",
        "project_dy kernel",
        "backward.cuh",
        "clear<Tile::kThreads>(p.arrived, p.arrived_count);",
        ";",
    ),
    Mutant("counters not zeroed", "all but the first", "slab_sums.cuh", "i += kThreads * 4)", "i += 1 << 30)"),
    Mutant("round forgotten", "dB of one chunk", "slab_sums.cuh", "int stored = adds ? 1 : 0;", "int stored = 0;"),
    Mutant("round forgotten", "dA of one chunk", "slab_sums.cuh", "p.adds ? 1 : 0;", "0;"),
    Mutant(
        "slot overwritten while read",
        "x kernel: dz that it makes",
        "backward.cuh",
        "dz_next.store(narrow_ring + slot * Tile::kNarrow,",
        "dz_next.store(narrow_ring,",
    ),
    Mutant(
        "edge mask removed",
        "rows of dz that the x kernel makes",
        "dz.cuh",
        "valid = row0 + row() < row_end;",
        "valid = true;",
    ),
    Mutant(
        "blocks write the same place",
        "dB: chunks that there are not",
        "db.cuh",
        "if (chunk >= p.chunks) return;",
        "",
    ),
    Mutant("block mistaken", "dB: its column of the grid", "db.cuh", "block_x() - p.first_column;", "block_x();"),
    Mutant("edge mask removed", "rows of dz and h", "dz.cuh", "if (first_row + row < job.m)", ""),
    Mutant(
        "fragment swapped", "project_dy: rows of dh", "dz.cuh", "own + 8 * kPitch + j * 8,", "own + 4 * kPitch + j * 8,"
    ),
    Mutant(
        "blocks write the same place",
        "z by every column block",
        "forward.cuh",
        "row0, column_block == 0,",
        "row0, true,",
    ),
    Mutant("dropout wrong", "mask of the second eight columns", "tile.cuh", "bits >> kVector)", "bits)"),
    Mutant("dropout wrong", "group of columns", "tile.cuh", "col / kDropoutColumns + group)", "group)"),
    Mutant(
        "dropout wrong",
        "factor of z",
        "forward.cuh",
        "p.inverse_keep * acc[j][2], p.inverse_keep * acc[j][3]",
        "acc[j][2], acc[j][3]",
    ),
    Mutant(
        "shared array too small",
        "forward: ring of x",
        "forward.cuh",
        "shared.take<T>(stages * Tile::kWide)",
        "shared.take<T>((stages - 1) * Tile::kWide)",
    ),
)


def apply(mutant: Mutant, csrc: Path) -> None:
    """Change the copy in ``csrc``."""
    path = csrc / "cuda" / mutant.file
    text = path.read_text()
    # The formatter may break a line anywhere: white space stands for any white space.
    pattern = r"\s+".join(re.escape(word) for word in mutant.old.split())
    places = list(re.finditer(pattern, text))
    if mutant.nth >= len(places):
        raise LookupError(f"{mutant.file}: no longer contains, {mutant.nth + 1} times, {mutant.old!r}")
    place = places[mutant.nth]
    path.write_text(text[: place.start()] + mutant.new + text[place.end() :])


def host_objects(kind: str, folder: Path) -> list[Path]:
    return list(build.compile_all(kind, [*build.core_sources(), *build.HOST], folder / kind).values())


def caught_by(mutant: Mutant | None, objects: dict[str, list[Path]], folder: Path) -> tuple[str, str]:
    """Return the build that notices the mutant and what it says, or two empty strings."""
    csrc = folder / "csrc"
    shutil.copytree(build.CSRC, csrc)
    if mutant is not None:
        apply(mutant, csrc)
    verdict = "", ""
    for kind, others in objects.items():
        kernels = build.compile_source(kind, build.KERNELS, folder / f"kernels-{kind}.o", csrc)
        program = build.link(kind, [*others, kernels], folder / f"driver-{kind}")
        content, line = build.run(kind, program, "--cases", CASES, timeout=300)
        if not content:
            verdict = kind, line
            break
    shutil.rmtree(folder)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th mutant only")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    mutants = MUTANTS[::QUICK] if options.quick else MUTANTS
    if options.list:
        print("\n".join(f"{m.kind}: {m.what} ({m.file})" for m in mutants))
        return 0
    caught = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        objects = {kind: host_objects(kind, folder) for kind in ("plain", "tsan")}
        kind, line = caught_by(None, objects, folder / "unchanged")
        if kind:
            print(f"the unchanged kernels fail already ({kind}): {line}")
            return 1
        verdicts = pool.map(
            lambda number: caught_by(mutants[number], objects, folder / str(number)),
            range(len(mutants)),
        )
        for mutant, (kind, line) in zip(mutants, verdicts, strict=True):
            caught += bool(kind)
            print(f"{kind or 'ESCAPED':8} {mutant.kind:28} {mutant.what:42} {line[:140]}", flush=True)
    kinds, seconds = len({m.kind for m in mutants}), time.monotonic() - start
    print(f"caught/planted: {caught}/{len(mutants)} ({kinds} kinds) in {seconds:.0f} s")
    return int(caught < len(mutants))


if __name__ == "__main__":
    raise SystemExit(main())
