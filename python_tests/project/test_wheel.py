"""The package as people install it: one portable wheel, built without torch, beside a torch that was there before.

``AFA_WHEEL_TORCH`` names that torch as pip does (``torch==2.6.*``); by default it is the oldest one, one in between and
the newest, each in a fresh environment. Slow: it compiles the wheel (without the CUDA kernels, unless
``AFA_BUILD_CUDA`` says otherwise; or takes that of ``AFA_WHEEL``) and installs torch.
"""

import ast
import io
import os
import platform
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from wheel_helpers import ROOT, environment, run, the_wheel

REQUIRED = {"torch", "numpy", "safetensors"}
EXTRAS = {
    "triton": {"triton"},
    "peft": {"peft"},
    "hf": {"transformers", "accelerate", "peft", "trl", "datasets"},
    "lightning": {"lightning"},
}
TRAIN = """
import sys
import torch
import afa_kernels as afa

assert sys.prefix in afa.__file__, afa.__file__
assert afa.backends()["cpu"].available, afa.backends()["cpu"].reason
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
afa.inject(model, target_modules=["0", "2"], r=4)
layer = model[0]
assert layer.plan(torch.randn(8, 16)).backend == "cpu", layer.plan(torch.randn(8, 16))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
schedule = afa.AnnealSchedule(40, end_frac=0.75).attach(model)
x, y = torch.randn(32, 16), torch.randint(4, (32,))
losses = []
for _ in range(40):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
afa.save_adapter(model, sys.argv[1])
before = model(x)
torch.testing.assert_close(afa.merge(model)(x), before)
print("trained with torch", torch.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return the_wheel(tmp_path_factory.mktemp("wheel"))


ASKED = os.environ.get("AFA_WHEEL_TORCH")


@pytest.fixture(scope="module", params=[ASKED] if ASKED else ["torch==2.6.*", "torch==2.9.*", "torch"])
def python(request, tmp_path_factory) -> Iterator[Path]:
    """The interpreter of a fresh environment with a torch and nothing of ours."""
    with environment(tmp_path_factory.mktemp("environment"), request.param, required=bool(ASKED)) as interpreter:
        yield interpreter


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_does_not_know_torch(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (core,) = (name for name in names if name.startswith("afa_kernels/_C."))
        assert b"libtorch" not in archive.read(core) and b"libc10" not in archive.read(core)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"afa_kernels", next(top for top in tops if top.endswith(".dist-info"))}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "afa_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources  # and nothing of an earlier build


@pytest.mark.slow
def test_it_holds_the_package_for_every_linux_that_torch_runs_on(wheel):
    """What the module asks of the system: nothing newer than manylinux_2_28, and nothing that has no version."""
    elf = pytest.importorskip("elftools.elf.elffile")
    assert f"manylinux_2_28_{platform.machine()}" in wheel.name
    assert wheel.stat().st_size < 3e6 or os.environ.get("AFA_BUILD_CUDA") == "1"
    with zipfile.ZipFile(wheel) as archive:
        (core,) = (name for name in archive.namelist() if name.startswith("afa_kernels/_C."))
        module = elf.ELFFile(io.BytesIO(archive.read(core)))
    symbols, versions = module.get_section_by_name(".dynsym"), module.get_section_by_name(".gnu.version")
    unversioned = {
        symbol.name
        for i, symbol in enumerate(symbols.iter_symbols())
        if symbol["st_shndx"] == "SHN_UNDEF"
        and symbol["st_info"]["bind"] == "STB_GLOBAL"
        and versions.get_symbol(i)["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
        and not symbol.name.startswith(("Py", "_Py"))
    }
    assert unversioned <= {"__tls_get_addr"}  # of the dynamic loader, which every process has


@pytest.mark.slow
def test_it_passes_its_own_test(wheel, python, tmp_path):
    run(python, "-m", "pip", "install", wheel, cwd=tmp_path)
    printed = run(python, "-m", "afa_kernels", "--self-test", cwd=tmp_path)
    lines = printed.partition("self-test")[2].splitlines()
    assert [line.split()[0] for line in lines[1:] if ": ok; " in line] == ["cpu", "torch", "reference"], printed


@pytest.mark.slow
def test_it_trains_beside_another_torch(wheel, python, tmp_path):
    version = "import torch; print(torch.__version__)"
    before = run(python, "-c", version)
    run(python, "-m", "pip", "install", wheel, cwd=tmp_path)
    assert run(python, "-c", version) == before, "installing the wheel changed torch"
    printed = run(python, "-c", TRAIN, tmp_path / "adapter", cwd=tmp_path)
    assert printed.strip() == f"trained with torch {before.strip()}"
    assert "available" in run(python, "-m", "afa_kernels", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_it_says(wheel, python, tmp_path, extra):
    plan = run(
        python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps",
        *_requirements(wheel, extra), cwd=tmp_path,
    )  # fmt: skip
    would = plan.rpartition("Would install ")[2].split()
    found = {entry.rpartition("-")[0].lower() for entry in would}
    assert EXTRAS[extra] <= found, plan


def _requirements(wheel: Path, extra: str) -> list[str]:
    """Return the requirements of an extra as the wheel itself states them."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = (line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:"))
    return [r.partition(";")[0].strip() for r in wanted if f'extra == "{extra}"' in r.replace("'", '"')]


def test_every_import_is_a_dependency_or_in_an_extra():
    """What the package imports, anywhere, is installed with it or with an extra."""
    own = {"afa_kernels"}
    own |= {"pytorch_lightning"}  # lightning under its older name
    own |= {"bitsandbytes"}  # for layers that are its own
    own |= {"axolotl", "pydantic"}  # of axolotl, which imports the module that imports them
    own |= {"vllm", "packaging"}  # of vLLM, in the same way
    allowed = REQUIRED.union(*EXTRAS.values(), own, sys.stdlib_module_names)
    for file in sorted((ROOT / "afa_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module] if node.level == 0 else []
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                assert module.split(".")[0] in allowed, f"{file.relative_to(ROOT)} imports {module}"


def test_the_extras_are_declared():
    try:
        import tomllib
    except ModuleNotFoundError:
        pytest.skip("Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements):
        return {r.partition("[")[0].partition(">")[0].partition("=")[0].strip() for r in requirements}

    assert names(project["dependencies"]) == REQUIRED
    for extra, wanted in EXTRAS.items():
        assert names(project["optional-dependencies"][extra]) == wanted, extra
