"""What is made of recorded rows: commits compared, pictures."""

import pytest
from bench_rows import ROOF, TINY, example_row

from bench import compare
from bench.results import Writer


def test_a_row_has_moved_if_ranges_are_apart_and_the_change_is_large():
    old = compare.Range(9.0, 10.0, 11.0)
    assert compare.moved(old, compare.Range(12.0, 13.0, 14.0), 0.05) == pytest.approx(1.3)
    assert compare.moved(old, compare.Range(10.5, 13.0, 14.0), 0.05) is None  # within the noise
    assert compare.moved(old, compare.Range(11.1, 11.2, 11.3), 0.25) is None  # too little
    lines = compare.report(
        {"a": old, "b": old, "gone": old},
        {"a": compare.Range(4.0, 5.0, 6.0), "b": old, "new": old},
        0.05,
    )
    assert [line.split() for line in lines] == [
        ["0.50x", "faster", "a"],
        ["gone", "gone"],
        ["new", "new"],
    ]


def test_two_files_of_results_are_compared(tmp_path, capsys):
    for name, factor in (("old", 1.0), ("new", 3.0)):
        writer = Writer(tmp_path / f"{name}.jsonl")
        times = {"p20_ms": 0.9 * factor, "p50_ms": factor, "p80_ms": 1.1 * factor}
        writer.write(example_row() | times)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("old", "new")]
    assert compare.main(files) == 0
    out = capsys.readouterr().out
    assert "3.00x  slower" in out and "1 compared, 1 moved" in out
    with pytest.raises(SystemExit):
        compare.main([files[0], "main"])


def test_pictures_are_drawn_from_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from bench import plot

    legends, save = {}, Figure.savefig

    def note_the_legend(figure, path, **options):
        legends[path.name] = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", note_the_legend)
    writer = Writer(tmp_path / "rows.jsonl")
    writer.write({"kind": "roof", "device": "cpu", "copy_bytes": 1, "gemm_size": {}} | ROOF)
    base = (
        example_row() | TINY._asdict() | {"pass": "both", "tax": 0.1, "tax_interval": [0.09, 0.11], "floor_tax": 0.05}
    )
    for provider in ("eager", "afa"):
        for m in (1, 2, 4):
            writer.write(base | {"provider": provider, "m": m})
        for r in (1, 2, 4):
            writer.write(base | {"provider": provider, "r": r})
        writer.write(base | {"provider": provider, "scope": "branch"})
    written = plot.draw([writer.path], tmp_path)
    assert {path.name for path in written} == {"tax_tokens.png", "tax_rank.png", "roofline.png"}
    for path in written:
        assert "AFA-LoRA in PyTorch code" in legends[path.name]
        assert path.read_bytes()[:4] == b"\x89PNG"
