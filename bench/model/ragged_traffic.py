"""The elements that every ragged Triton launch reads and writes, as traffic.py has those of the others.

They depend on the rows of each group, which the launch finds on the device: here the offsets of the launch have values.
What a program reads to find its group is left out: offsets, ranks, and the alpha_t, scaling and seed of the call.
"""

from collections.abc import Callable, Iterator

from triton import cdiv

from afa_kernels.backend.triton.launch import Launch

Elements = tuple[dict[str, int], dict[str, int]]
FINDING = frozenset({"ends_ptr", "ranks_ptr", "alpha_ptr", "scaling_ptr", "seed_ptr"})


def ranks_read(launch: Launch, r: int | None = None) -> int:
    """Return how many ranks of a and b a program reads, of ``r`` that they have: those of a packed copy are R."""
    constants = launch.constants
    if constants["RANK_STEP"] == constants["R"]:
        return constants["R"]
    return launch.arguments["r"] if r is None else r


def _branches(launch: Launch) -> Iterator[tuple[int, int]]:
    """Yield the rows and the rank of each group that has both."""
    ends, ranks = launch.arguments["ends_ptr"].tolist(), launch.arguments["ranks_ptr"]
    ranks = [launch.arguments["r"]] * len(ends) if ranks is None else ranks.tolist()
    for start, end, rank in zip([0, *ends], ends, ranks, strict=False):
        if end > start and rank > 0:
            yield end - start, rank


def _own(launch: Launch) -> int:
    return sum(rows for rows, _ in _branches(launch))


def _tiles(launch: Launch) -> list[int]:
    return [cdiv(rows, launch.constants["BLOCK_M"]) for rows, _ in _branches(launch)]


def _parts(launch: Launch, rows_per_tile: int, chunks_per_part: int) -> list[int]:
    """Return how many programs of a slab have rows of each group (``parts_with_rows`` in ragged_functions.py)."""
    tiles = [cdiv(rows, rows_per_tile) for rows, _ in _branches(launch)]
    return [cdiv(each, chunks_per_part * cdiv(each, launch.arguments["chunks"])) for each in tiles]


def _parts_of_pass(launch: Launch) -> list[int]:
    return _parts(launch, launch.constants["BLOCK_M"], launch.arguments["chunks_per_part"])


def _read(launch: Launch, programs: list[int]) -> int:
    """Return how many rows of a, or columns of b, so many programs of each group read."""
    ranks = [ranks_read(launch, rank) for _, rank in _branches(launch)]
    return sum(count * rank for count, rank in zip(programs, ranks, strict=True))


def _y(launch: Launch) -> Elements:
    if launch.arguments["y_ptr"] is None:
        return {}, {}
    m, n = launch.arguments["M"], launch.arguments["N"]
    return {"b_ptr": _read(launch, _tiles(launch)) * n, "base_ptr": m * n}, {"y_ptr": m * n}


def _forward(launch: Launch) -> Elements:
    k = launch.arguments["K"]
    read, written = _y(launch)
    read |= {"x_ptr": _own(launch) * k, "a_ptr": _read(launch, _tiles(launch)) * k}
    return read, written | {"z_ptr": launch.arguments["M"] * launch.arguments["r"]}


def _project_partial(launch: Launch) -> Elements:
    length, rank = launch.arguments["length"], launch.constants["R"]
    read = {"left_ptr": _own(launch) * length, "small_ptr": _read(launch, _tiles(launch)) * length}
    return read, {"partial_ptr": launch.grid[1] * _own(launch) * rank}


def _phi_hb(launch: Launch) -> Elements:
    arguments, columns = launch.arguments, launch.grid[1]
    read, written = _y(launch)
    read |= {"partial_ptr": columns * arguments["segments"] * _own(launch) * launch.constants["R"]}
    return read, written | {"z_ptr": arguments["M"] * arguments["r"]}


def _dyb_dphi(launch: Launch) -> Elements:
    n, rank, own = launch.arguments["N"], launch.constants["R"], _own(launch)
    read = {"dy_ptr": own * n, "b_ptr": _read(launch, _tiles(launch)) * n, "z_ptr": own * launch.arguments["r"]}
    return read, {"dz_ptr": own * rank}


def _dphi(launch: Launch) -> Elements:
    rank, own = launch.constants["R"], _own(launch)
    read = {"partial_ptr": launch.arguments["count"] * own * rank, "z_ptr": own * launch.arguments["r"]}
    return read, {"dz_ptr": own * rank}


def _dy_pass(launch: Launch) -> Elements:
    arguments, rank, slabs, own = launch.arguments, launch.constants["R"], launch.grid[0], _own(launch)
    parts = _parts_of_pass(launch)
    read = {"dy_ptr": own * arguments["N"]}
    if arguments["dh_ptr"] is not None:
        read["b_ptr"] = _read(launch, parts) * arguments["N"]
    if arguments["db_ptr"] is not None:
        read["z_ptr"] = slabs * own * arguments["r"]
    return read, {"dh_ptr": slabs * own * rank, "db_ptr": sum(parts) * rank * arguments["N"]}


def _x_pass(launch: Launch) -> Elements:
    arguments, rank, slabs, own = launch.arguments, launch.constants["R"], launch.grid[0], _own(launch)
    parts = _parts_of_pass(launch)
    read = {"dz_ptr": slabs * own * rank}
    if arguments["dx_ptr"] is not None:
        read["a_ptr"] = _read(launch, parts) * arguments["K"]
    if arguments["da_ptr"] is not None:
        read["x_ptr"] = own * arguments["K"]
    rows_of_dx = arguments["M"]
    if launch.constants["ADDS_DX"]:
        rows_of_dx = own
        read["dx_ptr"] = own * arguments["K"]
    return read, {"dx_ptr": rows_of_dx * arguments["K"], "da_ptr": sum(parts) * rank * arguments["K"]}


def _weight_gradients(launch: Launch) -> Elements:
    arguments, rank = launch.arguments, launch.constants["R"]
    read, written = {}, {}
    for name, suffix, width in (("da", "_a", arguments["K"]), ("db", "_b", arguments["N"])):
        parts = _parts(launch, arguments[f"rows_per_tile{suffix}"], arguments[f"chunks_per_part{suffix}"])
        read[f"{name}_partial_ptr"] = sum(parts) * rank * width
        written[f"{name}_ptr"] = arguments["G"] * arguments["r"] * width
    return read, written


def _pack(launch: Launch) -> Elements:
    k, n, rank = launch.arguments["K"], launch.arguments["N"], launch.constants["R"]
    own = [each for _, each in _branches(launch)]
    padded = len(own) * rank
    return {"a_ptr": sum(own) * k, "b_ptr": sum(own) * n}, {"a_padded_ptr": padded * k, "b_padded_ptr": padded * n}


ELEMENTS: dict[str, Callable[[Launch], Elements]] = {
    "ragged_xa_phi_hb_forward_kernel": _forward,
    "ragged_project_partial_kernel": _project_partial,
    "ragged_phi_hb_forward_kernel": _phi_hb,
    "ragged_dyb_dphi_backward_kernel": _dyb_dphi,
    "ragged_dphi_backward_kernel": _dphi,
    "ragged_dy_pass_backward_kernel": _dy_pass,
    "ragged_x_pass_backward_kernel": _x_pass,
    "ragged_weight_gradients_kernel": _weight_gradients,
    "ragged_pack_kernel": _pack,
}
