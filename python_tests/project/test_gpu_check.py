"""gpu_check without a GPU: what it says, how steps end, and a rehearsal with simulated cards in the place of one,
without a network, in an environment that has only what such a machine has."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import bare_environment
import ptx_cuda
import pytest
import torch
from conftest import skip_unless_available

from tools import gpu_check, gpu_right
from tools.gpu_check import CALLS, Call, Step

ROOT = Path(__file__).resolve().parents[2]
HELPERS = [str(ROOT / "python_tests" / folder) for folder in ("", "ptx_machine", "project")]
PACKAGES = [
    "torch", "triton", "pybind11", "ninja", "cmake", "pytest", "pytest-xdist", "numpy", "safetensors", "peft",
    "transformers",
]  # fmt: skip
SIMULATED = {gpu_check.CARD: "simulated_card", "TRITON_INTERPRET": "1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_checked(capfd, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path)]) == gpu_check.ABSENT == 77
    said = capfd.readouterr().out
    assert f"Nothing was checked: torch {torch.__version__} sees no GPU." in said
    assert "build" not in said


@pytest.mark.parametrize(
    "arguments, told",
    [(["--only", "nonsense"], "expected some of machine, build"), (["5"], "CALL: expected some of 1, 2, 3, 4, got 5")],
)
def test_what_is_unknown_is_an_error(arguments, told, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert told in capsys.readouterr().err


def test_the_steps_of_a_call_have_room_in_it():
    for call in CALLS.values():
        assert sum(step.seconds for step in call.steps) <= gpu_check.SECONDS <= 9 * 60


def test_every_step_is_there():
    pytest.importorskip("triton")
    from tools import gpu_measure

    known = {"tools.gpu_right": gpu_right.STEPS, "tools.gpu_measure": gpu_measure.STEPS}
    for call in CALLS.values():
        assert [step.name for step in call.steps if step.name not in known[step.module]] == []


# --- How steps end


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """Run a call of steps that end badly; return its exit status, the outcome of each, its rows and its page."""

    def run(*names: str, seconds: float = 120.0, own: float = 10.0):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(HELPERS))
        steps = tuple(Step(name, f"what {name} does", own, "faulty_steps") for name in names)
        monkeypatch.setattr(gpu_check, "CALLS", {1: Call("Does it end?", steps)})
        status = gpu_check.main(["1", "--out", str(tmp_path), "--seconds", str(seconds)])
        records = [json.loads(line) for line in (tmp_path / "call-1.jsonl").read_text().splitlines()]
        outcomes = {record["step"]: record for record in records if record["kind"] == "step"}
        return status, outcomes, [r for r in records if r["kind"] == "row"], (tmp_path / "call-1.md").read_text()

    return run


def test_a_step_ends_itself_alone(faulty, capsys):
    """It crashes, raises or fills the memory: rows from before are kept, and the others run."""
    status, outcomes, rows, page = faulty("crashes", "raises", "fills_the_memory", "wrong", "absent", "fine")
    assert status == 1
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "crashes": "died", "raises": "failed", "fills_the_memory": "failed", "wrong": "failed", "absent": "absent",
        "fine": "ok",
    }  # fmt: skip
    assert "SIGSEGV" in outcomes["crashes"]["message"]
    assert "illegal memory access" in outcomes["raises"]["message"] and "Traceback" in outcomes["raises"]["tail"]
    assert "MemoryError" in outcomes["fills_the_memory"]["message"]
    assert outcomes["wrong"]["message"] == "1 of 2 rows are wrong, the first: 0.5 is not 0.25"
    assert outcomes["absent"]["message"] == "no such tool"
    for name in ("crashes", "raises", "fills_the_memory"):
        assert [row["what"] for row in rows if row["step"] == name] == ["before"]
    assert "## fine: what fine does" in page and "| 2 | a/b |" in page
    assert capsys.readouterr().out.rstrip().endswith(page.rstrip()), "the table comes last"


def test_what_is_right_or_absent_is_all_right(faulty):
    assert faulty("fine", "absent")[0] == 0


def test_a_step_that_hangs_ends_with_all_that_it_started(faulty):
    status, outcomes, rows, _ = faulty("hangs", "fine", seconds=16.0, own=8.0)
    assert status == 1 and outcomes["hangs"]["status"] == "timeout" and outcomes["fine"]["status"] == "ok"
    assert "waiting for a barrier" in outcomes["hangs"]["message"]
    assert outcomes["hangs"]["seconds"] < 10
    (child,) = (row["child"] for row in rows if row["step"] == "hangs")
    for _ in range(50):  # a zombie until init has taken note
        if not _runs(child):
            break
        time.sleep(0.1)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_that_is_up_is_said(faulty):
    status, outcomes, _, _ = faulty("hangs", "fine", seconds=3.0, own=60.0)
    assert status == 1 and outcomes["hangs"]["status"] == "timeout" and outcomes["fine"]["status"] == "left out"


def test_rows_are_there_before_a_step_ends(tmp_path):
    results = tmp_path / "rows.jsonl"
    variables = os.environ | {gpu_check.RESULTS: f"{results}:hangs", "PYTHONPATH": os.pathsep.join(HELPERS)}
    process = subprocess.Popen([sys.executable, "-m", "faulty_steps", "hangs"], env=variables, cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not (results.exists() and results.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        (row,) = map(json.loads, results.read_text().splitlines())
        assert row["step"] == "hangs" and process.poll() is None
        os.kill(row["child"], 9)
    finally:
        process.kill()
        process.wait()


# --- What the steps read


@pytest.mark.parametrize("tested", [("cuda", "triton"), ("cuda",), ()])
def test_a_backend_that_the_self_test_left_out_is_a_fault(tested, monkeypatch):
    """The command names every backend in its head, available or not."""
    said = (
        "  cuda       not available\n  triton     available\nself-test, against float64:\ncpu        on cpu: ok; 1 s\n"
    )
    said += "".join(f"{name:<10} on cuda: ok; 24 calls, 1.0 s\n" for name in tested)
    done = subprocess.CompletedProcess([], 0, said)
    monkeypatch.setattr(gpu_right.subprocess, "run", lambda *_, **__: done)
    faults = [row["fault"] for row in gpu_right.self_test(gpu_right.Card()) if "fault" in row]
    assert faults == [f"{name} was not tested" for name in ("cuda", "triton") if name not in tested][:1]


def test_a_thread_that_raises_is_a_fault(monkeypatch):
    step = gpu_right.Layer.step

    def raises_in_threads(layer, backend):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("an illegal memory access was encountered")
        return step(layer, backend)

    monkeypatch.setattr(gpu_right.Layer, "step", raises_in_threads)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    card = gpu_right.Card("cpu", cuda="torch", triton="reference", small=True, in_threads=("torch",))
    rows = {(row["backend"], row["way"]): row for row in gpu_right.streams(card)}
    assert "fault" in rows["torch", "in threads"] and "fault" not in rows["torch", "on streams"]
    assert ("reference", "in threads") not in rows


def test_a_replay_that_differs_is_a_fault(monkeypatch):
    """One that does not follow alpha_t."""

    def at_capture(function, device):
        results = function()
        return results, lambda: None

    monkeypatch.setattr(gpu_right, "in_graph", at_capture)
    card = gpu_right.Card("cpu", cuda="torch", triton="reference", small=True)
    assert all("fault" in row for row in gpu_right.graphs(card))


def test_a_test_that_fails_is_a_row(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_right():\n    pass\n\n\ndef test_wrong():\n    assert 1 == 2\n")
    card = gpu_right.Card(selects={"cuda": "test"})
    *failed, last = gpu_right._pytest(card, "cuda", str(tmp_path))
    assert [row["test"].rpartition("::")[2] for row in failed] == ["test_wrong"] and failed[0]["fault"]
    assert "1 failed, 1 passed" in last["result"] and last["fault"] == "exit status 1"


def program(folder: Path, name: str, text: str) -> None:
    """Write a program that runs what it is given, from Python on, and then does as ``text`` says."""
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        "at = next(i for i, word in enumerate(sys.argv[1:], 1) if word.rpartition('/')[2].startswith('python'))\n"
        f"done = subprocess.run(sys.argv[at:], stdout=subprocess.PIPE, text=True)\n{text}"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SANITIZER = """
assert "kns=3afa" in sys.argv and "--error-exitcode" in sys.argv
print("========= ERROR SUMMARY: 0 errors")
sys.exit(done.returncode)
"""
NCU = """
metrics = sys.argv[sys.argv.index("--metrics") + 1].split(",")
print(done.stdout, "==PROF== Connected", sep="\\n")
for line in (
    ["ID", "Kernel Name", *metrics[:-1]],
    ["", "", "ns", *["%"] * (len(metrics) - 2)],
    ["0", "void afa::forward_kernel<afa::Bf16, 16>(afa::ForwardParams)", "12,345", *["1.5"] * (len(metrics) - 2)],
):
    print(",".join(f'"{word}"' for word in line))
sys.exit(done.returncode)
"""


def test_what_a_sanitizer_finds_is_a_fault(tmp_path, monkeypatch):
    program(
        tmp_path, "compute-sanitizer",
        "print('========= Invalid __global__ read of size 16 bytes')\n"
        "print('========= ERROR SUMMARY: 1 error')\nsys.exit(86)\n",
    )  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (row,) = gpu_right.sanitizer(gpu_right.Card(), "memcheck")
    assert row["fault"] == "Invalid __global__ read of size 16 bytes" and row["said"] == "ERROR SUMMARY: 1 error"


def test_counters_are_read_whatever_is_missing():
    pytest.importorskip("triton")
    from tools.gpu_measure import counted

    text = (
        '==PROF== Connected to process 1\n"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum"\n'
        '"","","ns","inst"\n"0","void afa::x_kernel<afa::Bf16, 16>(afa::OuterParams)","98,500","1,234"\n'
    )
    (row,) = counted(text)
    assert row["kernel"] == "void afa::x_kernel<afa::Bf16, 16>" and row["us"] == 98.5 and row["instructions"] == 1234
    assert row["dram %"] == "no such metric"
    assert list(counted("==ERROR== no kernels were profiled")) == []


_VARIANT = """
import ptx_cuda, torch
from tools.gpu_right import Layer, Card
ptx_cuda.register()
with ptx_cuda.kernels.on(ptx_cuda.DEVICES["sm_90"]):
    results = Layer.random((600, 72, 136, 16), Card("cpu", dtype=torch.float16)).step(ptx_cuda.NAME)
launches = ptx_cuda._cuda_on_ptx.take_launches()
print([float(t.double().sum()) for t in results[:2]])
print(sorted({(l["carveout"], l["overlaps"]) for l in launches}))
print([l["shared_bytes"] for l in launches])
print([l["grid"] for l in launches])
"""


def test_variants_change_launches_and_no_row():
    """The rings, the chunks, and what the runtime is told; rows of y and dx have the same bits."""
    skip_unless_available(ptx_cuda.NAME)

    def said(variant: str) -> subprocess.CompletedProcess:
        variables = os.environ | {"AFA_CUDA_VARIANT": variant, "PYTHONPATH": os.pathsep.join([str(ROOT), *HELPERS])}
        return subprocess.run([sys.executable, "-c", _VARIANT], env=variables, capture_output=True, text=True)

    rows, told, rings, grids = said("").stdout.splitlines()
    other_rows, other_told, *_ = said("stages=2 chunks=1 overlap=0 carveout=-1").stdout.splitlines()
    assert rows == other_rows
    _, _, fewer_stages, same_grids = said("stages=2").stdout.splitlines()
    assert rings != fewer_stages and grids == same_grids
    _, _, _, one_chunk = said("chunks=1").stdout.splitlines()
    assert grids != one_chunk
    assert told == "[(100, True)]" and other_told == "[(-1, False)]"
    wrong = said("stage=2")
    assert wrong.returncode and "expected stages=, chunks=, overlap= or carveout=, got stage=2" in wrong.stderr


# --- The rehearsal


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory):
    """A copy of the sources, and the Python of a machine without this project's environment."""
    skip_unless_available(ptx_cuda.NAME)
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile the kernels with")
    folder = tmp_path_factory.mktemp("bare")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    tree = folder / "tree"
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for module in (ROOT / "afa_kernels").glob("_*ptx*.so"):  # the card
        shutil.copy2(module, tree / "afa_kernels")
    tools = folder / "tools"
    tools.mkdir()
    program(tools, "compute-sanitizer", SANITIZER)
    program(tools, "ncu", NCU)
    return tree, bare_environment.make(folder / "python", PACKAGES), tools


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_rehearsal(call, bare_machine, tmp_path):
    tree, python, tools = bare_machine
    helpers = [str(tree / "python_tests" / folder) for folder in ("", "ptx_machine", "project")]
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(helpers),
        "CMAKE_BUILD_TYPE": "Debug",  # compiles in less time
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton/cache")),
        **SIMULATED,
    }  # fmt: skip
    isolated = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*isolated, "true"], capture_output=True).returncode:
        isolated = []  # a machine that lets nobody have a network of their own
    command = [*isolated, "make", "gpu-check", f"PYTHON={python}", f"ARGS={call} --out {tmp_path}"]
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)
    records = [json.loads(line) for line in (tmp_path / f"call-{call}.jsonl").read_text().splitlines()]
    outcomes = {record["step"]: record for record in records if record["kind"] == "step"}
    assert done.returncode == 0, [o for o in outcomes.values() if o["status"] not in ("ok", "absent")] or done.stderr
    assert list(outcomes) == [step.name for step in CALLS[call].steps]
    # The profiler and --tune know cards alone; both have tests of their own.
    absent = {name for name, outcome in outcomes.items() if outcome["status"] == "absent"}
    assert absent == {"model", "tune"} & outcomes.keys()
    with_rows = {record["step"] for record in records if record["kind"] == "row"}
    assert with_rows == outcomes.keys() - absent
    page = (tmp_path / f"call-{call}.md").read_text()
    assert done.stdout.rstrip().endswith(page.rstrip())
    assert sum(outcome["seconds"] for outcome in outcomes.values()) < gpu_check.SECONDS
