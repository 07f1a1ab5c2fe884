"""What is made of recorded rows: the tables of the documents, the goals, the pictures."""

import re

import pytest
from bench_rows import ROOF, TINY, example_row

from bench import __main__ as command
from bench import goals, pages
from bench.cases import PRESETS, cases
from bench.results import RESULTS, Writer, read
from bench.shapes import Case


def rows_of(taxes: dict[str, float], ratios: dict[str, float], **changes) -> list[dict]:
    """Rows of one problem: providers with the given taxes, give or take 1%, and times over ours, give or take 0.05."""
    base = example_row() | TINY._asdict() | {"pass": "both", "cache": "hot", "launch": "eager", "floor_ms": 1.0}
    rows = [base | {"provider": "frozen"} | changes]
    for name, tax in taxes.items():
        taxed = {"tax": tax, "tax_interval": [tax - 0.01, tax + 0.01], "floor_tax": 0.04, "peft_share": tax / 0.2}
        over_ours = {"afa": ratios[name]} if name in ratios else {name: 1 / value for name, value in ratios.items()}
        intervals = {other: [value - 0.05, value + 0.05] for other, value in over_ours.items()}
        rows.append(base | taxed | {"provider": name, "ratio": over_ours, "ratio_interval": intervals} | changes)
    return rows


LAYER = rows_of(
    {"peft": 0.2, "eager": 0.05, "afa": 0.1, "afa.again": 0.11}, {"eager": 1.25, "peft": 0.8, "afa.again": 1}
)


def test_the_pages_quote_the_recorded_results():
    sections = pages.sections(pages.FILES)
    assert sections[pages.PERFORMANCE].keys() == {table.title for table in goals.TABLES}
    assert sections[pages.README].keys() == {"outcome", "training step"}
    assert sections[pages.MEMORY].keys() == {"formats"}
    for page, texts in sections.items():
        text = page.read_text()
        assert pages.written(text, texts) == text, "python -m bench.pages --write"
        title, text = next(iter(texts.items()))
        with pytest.raises(ValueError, match=title):
            pages.written("", {title: text})


@pytest.mark.parametrize("preset", [name for name in PRESETS if (RESULTS / f"{name}.jsonl").exists()])
def test_a_recorded_file_has_the_cases_of_its_preset(preset):
    recorded = [row for row in read(RESULTS / f"{preset}.jsonl") if row["kind"] == "row"]
    wanted = cases(command.parser().parse_args(["--preset", preset, "--device", "cpu"]))
    assert {tuple(row[name] for name in Case._fields) for row in recorded} == set(wanted)


def test_a_table_marks_the_least_tax_whoever_has_it():
    assert pages.layer_table(LAYER)[2:] == [
        "| fp32 40 24 56 4 | 1 | 20.0 | **5.0** | 10.0 [9.0, 11.0] | 4.0 | +0.0 [-5.0, 5.0] |"
    ]
    step = [
        row for alpha_t in (0.0, 0.5) for row in rows_of({"peft": 0.2, "afa": 0.1}, {}, scope="model", alpha_t=alpha_t)
    ]
    assert pages.step_table(step)[2:] == [
        f"| fp32 | {alpha_t} | 1 | 20.0 [19.0, 21.0] | **10.0** [9.0, 11.0] | - |" for alpha_t in ("0.5", "0")
    ]
    for table in (pages.layer_table, pages.step_table):
        assert table([{key: row[key] for key in row if key != "tax"} for row in LAYER + step]) == []  # too few rounds


def test_ratios_have_a_geometric_mean():
    rows = [
        row for m, ratio in ((1, 2.0), (2, 4.5))
        for row in rows_of({"eager": 0.2, "afa": 0.1}, {"eager": ratio}, scope="branch", m=m)
    ]  # fmt: skip
    assert pages.branch_table(rows)[2:] == [
        "| fp32 1 24 56 4 | 1 | 2.00 [1.95, 2.05] | - | - |",
        "| fp32 2 24 56 4 | 1 | 4.50 [4.45, 4.55] | - | - |",
        "| geometric mean |  | 3.00 | - |  |",
    ]


def standing_in_numbers(rows: list[dict]) -> list[list[float]]:
    return [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)] for line in goals.standing(rows)]


def test_the_standing_counts_what_is_met():
    faster, floor = standing_in_numbers(LAYER)
    assert faster == [1, 2, 1] and floor == [2.5, 2.5, 1.5, 0, 1], "won, compared, won by more than the error; goal"
    faster, floor = standing_in_numbers(rows_of({"peft": 0.2, "afa": 0.06}, {"peft": 1.01}))
    assert faster == [1, 1, 0] and floor == [1.5, 1.5, 1.5, 1, 1]
    steps = rows_of({"peft": 0.2, "afa": 0.1, "afa.peft": 0.14}, {}, scope="model")
    assert standing_in_numbers(steps) == [[0.5, 0.7, 0.6, 1, 2]]
    check = goals.self_check([*LAYER, *rows_of({"afa": 0.1, "afa.again": 0.1}, {"afa.again": 1.1})])
    assert check == {"kind": "self_check", "pairs": 2, "include_one": 1, "largest": pytest.approx(0.1)}
    assert goals.self_check(steps) is None and list(goals.standing([])) == []


def test_a_file_of_ones_own_is_shown(tmp_path, capsys):
    writer = Writer(tmp_path / "own.jsonl")
    environment = read(pages.FILES[0])[0]
    for record in (environment, *LAYER):
        writer.write(record)
    assert pages.main([str(writer.path)]) == 0
    shown = capsys.readouterr().out
    assert "| fp32 40 24 56 4 |" in shown and "met in 0 of 1" in shown


def test_pictures_are_drawn_from_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from bench import plot

    shown, save = {}, Figure.savefig

    def note(figure, path, **options):
        legend = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        shown[path.name] = legend, [axes.get_title() for axes in figure.axes]
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    writer = Writer(tmp_path / "rows.jsonl")
    writer.write({"kind": "roof", "device": "cpu", "copy_bytes": 1, "gemm_size": {}} | ROOF)
    values = [{"m": 1}, {"m": 2}, {"m": 4}, {"r": 1}, {"r": 2}, {"r": 8}, {"scope": "branch"}]
    values += [{"scope": "experts", "layer": f"{e}x24x56{how}"} for e in (2, 4, 8) for how in ("", ".skewed")]
    for changes in values:
        for row in rows_of({"eager": 0.2, "afa": 0.1}, {}, **changes)[1:]:
            writer.write(row)
    for method, base in (("full", "dense"), ("peft", "dense"), ("afa", "dense"), ("peft", "nf4"), ("afa", "nf4")):
        step = {"model": "llama", "base": base, "checkpointing": "on", "method": method}
        writer.write({"kind": "training", "peak_mb": 300.0, "ms": 1.0, "of_peft": 1.0} | step)
    written = plot.draw([writer.path], tmp_path)
    assert [path.stem for path in written] == ["tax_tokens", "tax_rank", "tax_experts", "training_memory", "roofline"]
    assert shown["training_memory.png"][0] == ["full fine-tuning", "PEFT LoRA", "afa_kernels"]
    for path in written:
        assert path.stem == "training_memory" or "AFA-LoRA in PyTorch code" in shown[path.name][0]
        assert path.read_bytes()[:4] == b"\x89PNG"
    routings = shown["tax_experts.png"][1]
    assert len(routings) == 2 and "even" in routings[0] and "skewed" in routings[1]
