"""The fixed-width table of rows."""

_COLUMNS = (
    f"{'pass':15} {'layer':19} {'M':>6} {'r':>4} {'dtype':>9} {'alpha':>5} | {'provider':20} "
    f"{'p50 ms':>9} {'[p20 - p80]':>19} {'/eager':>7} {'/peft':>7} {'tax %':>7} {'±':>5} {'floor%':>7} "
    f"{'x floor':>8} {'GFLOP/s':>10} {'GB/s':>6} {'peak MB':>8} {'err':>5}"
)
HEADER = f"{_COLUMNS}\n{'-' * len(_COLUMNS)}"


def line(row: dict[str, object]) -> str:
    """Return one row of the table: what :data:`HEADER` names, "-" where it does not apply."""
    dtype = row["dtype"]
    if row["adapter_dtype"] != dtype:
        dtype += f"+{row['adapter_dtype']}"
    name = row["pass"] if row["scope"] == "layer" else f"{row['scope'][:1]}.{row['pass']}"
    spread = f"[{row['p20_ms']:.3f} - {row['p80_ms']:.3f}]"
    ratio = row["ratio"]
    half = row["tax_interval"][1] - row["tax_interval"][0] if "tax_interval" in row else None
    return (
        f"{name[:15]:15} {row['layer'][:19]:19} {row['m']:>6} {row['r']:>4} {dtype:>9} "
        f"{row['alpha_t']:>5g} | {row['provider']:20} {row['p50_ms']:>9.3f} {spread:>19} "
        f"{_number(ratio.get('eager')):>7} {_number(ratio.get('peft')):>7} "
        f"{_number(row.get('tax'), 100, 1):>7} {_number(half, 50, 1):>5} {_number(row.get('floor_tax'), 100, 1):>7} "
        f"{_number(row.get('over_floor')):>8} "
        f"{row['gflop_s']:>5.0f} {_share(row['gflop_share']):>4} "
        f"{row['gb_s']:>6.1f} {row['peak_bytes'] / 1e6:>8.2f} {row['error_ratio']:>5.2f}"
    )


def _number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _share(value: float) -> str:
    return f"{min(value, 9.99) * 100:.0f}%"
