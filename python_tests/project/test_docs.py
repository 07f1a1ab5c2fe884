"""The documents are right: their examples run, in order, and what they link to and name exists: commands with their
flags, targets of make, extras of the package, files, environment variables.

A block starts with three backticks and ``python``. The blocks of a page share one namespace, as a
reader would type them. ``python cuda`` marks a block that needs such a device.
"""

import ast
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python *(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
FOLDERS = ("afa_kernels", "bench", "csrc", "docs", "examples", "experiments", "python_tests", "tools")
COMMAND = re.compile(rf"-m ((?:{'|'.join(FOLDERS)})(?:\.\w+)*)")
FLAGS = re.compile(rf"-m ((?:{'|'.join(FOLDERS)}))\b((?:\\\n|[^`#\n])*)")
MAKE = re.compile(r"(?:^    |`|\$ )(?:[A-Z_]+=\S+ )*make ([a-z][a-z0-9-]*)", re.MULTILINE)
EXTRAS = re.compile(r"(?:afa-kernels|'\.|\.)\[([a-z,]+)\]'")
VARIABLE = re.compile(r"\"(AFA_[A-Z_]+)\"|ENV\{(AFA_\w+)\}|foreach\(option ([A-Z_ ]+)\)")
FILE = re.compile(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./]*\.(?:cpp|h|json|md|png|py|yaml)\b")


def texts() -> dict[Path, str]:
    """Return what tells a reader of commands and files: every page, the Makefile and the sources."""
    pages = [ROOT / "CONTRIBUTING.md", *PAGES, *(p for f in FOLDERS for p in (ROOT / f).rglob("README.md"))]
    sources = [p for f in FOLDERS for kind in ("py", "yaml") for p in (ROOT / f).rglob(f"*.{kind}")]
    paths = [*pages, *(ROOT / "experiments" / "results").glob("*.md"), ROOT / "Makefile", *sources]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def pages() -> dict[Path, str]:
    return {path: text for path, text in texts().items() if path.suffix == ".md"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the device that each example needs, and its code on the lines that it has in the
    page."""
    text = page.read_text(encoding="utf-8")
    return [(match[1], "\n" * text.count("\n", 0, match.start(2)) + match[2]) for match in BLOCK.finditer(text)]


def imported(code: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def assert_exist(named: Iterable[tuple[Path, str]], exists: Callable[[str], bool]) -> None:
    """Fail with what does not exist, or where nothing is named: then it was not looked for where it is."""
    named = set(named)
    missing = sorted(f"{path}: {name}" for path, name in named if not exists(name))
    assert named and not missing, missing


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for device, code in blocks(page):
        missing = [name for name in imported(code) if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{page.name} needs {', '.join(sorted(missing))}")
        if device and not getattr(torch, device).is_available():
            continue
        exec(compile(code, str(page), "exec"), namespace)


def test_every_page_of_an_integration_has_an_example():
    for name in ("peft", "trainer", "trl", "lightning", "stacks"):
        assert blocks(ROOT / "docs" / f"{name}.md"), name


def test_links_lead_somewhere():
    # GitHub shows the README at /OWNER/NAME/blob/BRANCH, so that a badge finds its workflow in whatever fork it stands.
    badge = re.compile(r"\.\./\.\./actions/(workflows/\w+\.yml)(?:/badge\.svg)?")
    for path, text in pages().items():
        for target in LINK.findall(text):
            place = ROOT / badge.sub(r".github/\1", target) if badge.fullmatch(target) else path.parent / target
            assert place.exists(), f"{path}: {target}"


def test_commands_and_files_that_are_named_exist():
    named = texts().items()
    commands = ((path, module) for path, text in named for module in COMMAND.findall(text))
    assert_exist(commands, lambda module: importlib.util.find_spec(module) is not None)
    assert_exist(((path, file) for path, text in named for file in FILE.findall(text)), lambda f: (ROOT / f).exists())


def test_flags_that_are_named_exist():
    sources = {
        folder: "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py"))
        for folder in FOLDERS
    }

    def exists(named: str) -> bool:
        folder, flag = named.split(" --")
        # A parser's own, or made of a name: of a field of the settings, or a key of the defaults.
        name = flag.replace("-", "_")
        made = re.search(rf"^    {name}: |\"{name}\": |\b{name}=", sources[folder], re.MULTILINE)
        return f'"--{flag}"' in sources[folder] or made is not None

    assert_exist(
        (
            (path, f"{folder} --{flag}")
            for path, text in pages().items()
            for folder, arguments in FLAGS.findall(text)
            for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", arguments)
        ),
        exists,
    )


def test_targets_of_make_and_extras_that_are_named_exist():
    named = pages().items()
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert_exist(((path, target) for path, text in named for target in MAKE.findall(text)), targets.__contains__)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    wanted = ((path, extra) for path, text in named for names in EXTRAS.findall(text) for extra in names.split(","))
    assert_exist(wanted, extras.__contains__)


def test_every_environment_variable_is_documented():
    sources = [*(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cpp", ".h"))]
    content = "\n".join(p.read_text(encoding="utf-8") for p in (*sources, ROOT / "setup.py", ROOT / "CMakeLists.txt"))
    read = {name for names in VARIABLE.findall(content) for group in names for name in group.split()}
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(AFA_\w+)` \|", page, re.MULTILINE)
    assert read and sorted(read) == sorted(table), read ^ set(table)
