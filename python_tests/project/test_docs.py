"""The documents are right: their examples run, in order, and what they link to and name exists: commands with their
flags, targets of make, extras of the package, files, environment variables.

A block starts with three backticks and ``python``. The blocks of a page share one namespace, as a
reader would type them. ``python cuda`` marks a block that needs such a device.
"""

import ast
import importlib.util
import re
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


def texts() -> list[Path]:
    """Return what tells a reader of commands and files: every page, the Makefile and the sources."""
    pages = [ROOT / "CONTRIBUTING.md", *PAGES, *(p for f in FOLDERS for p in (ROOT / f).rglob("README.md"))]
    sources = [p for f in FOLDERS for kind in ("py", "yaml") for p in (ROOT / f).rglob(f"*.{kind}")]
    return [*pages, *(ROOT / "experiments" / "results").glob("*.md"), ROOT / "Makefile", *sources]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the device that each example needs, and its code on the lines that it has in the
    page."""
    text = page.read_text(encoding="utf-8")
    return [(match[1], "\n" * text.count("\n", 0, match.start(2)) + match[2]) for match in BLOCK.finditer(text)]


def imported(code: str) -> set[str]:
    tree = ast.walk(ast.parse(code))
    names = {
        name
        for node in tree
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    return {name.partition(".")[0] for name in names}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    runnable = [(device, code) for device, code in blocks(page)]
    for device, code in runnable:
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
    pages = [text for text in texts() if text.suffix == ".md"]
    targets = [(page, target) for page in pages for target in LINK.findall(page.read_text(encoding="utf-8"))]
    # GitHub shows the README at /OWNER/NAME/blob/BRANCH, so that a badge finds its workflow in whatever fork it stands.
    badge = re.compile(r"\.\./\.\./actions/(workflows/\w+\.yml)(?:/badge\.svg)?")
    broken = [
        f"{page}: {target}"
        for page, target in targets
        if not (ROOT / badge.sub(r".github/\1", target) if badge.fullmatch(target) else page.parent / target).exists()
    ]
    assert not broken and len(targets) > 40, broken


def test_commands_and_files_that_are_named_exist():
    named = [(text, text.read_text(encoding="utf-8")) for text in texts()]
    commands = {(text, module) for text, content in named for module in COMMAND.findall(content)}
    missing = [f"{text}: -m {module}" for text, module in commands if importlib.util.find_spec(module) is None]
    files = {(text, file) for text, content in named for file in FILE.findall(content)}
    missing += [f"{text}: {file}" for text, file in files if not (ROOT / file).exists()]
    assert not missing and len(commands) > 40 and len(files) > 20, missing


def test_flags_that_are_named_exist():
    sources = {
        folder: "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py"))
        for folder in FOLDERS
    }
    pages = [(text, text.read_text(encoding="utf-8")) for text in texts() if text.suffix == ".md"]
    named = {
        (text, folder, flag)
        for text, content in pages
        for folder, arguments in FLAGS.findall(content)
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", arguments)
    }

    def exists(folder: str, flag: str) -> bool:
        # A parser's own, or made of a name: of a field of the settings, or a key of the defaults.
        name = flag.replace("-", "_")
        made = re.search(rf"^    {name}: |\"{name}\": |\b{name}=", sources[folder], re.MULTILINE)
        return f'"--{flag}"' in sources[folder] or made is not None

    missing = [f"{text}: -m {folder} --{flag}" for text, folder, flag in named if not exists(folder, flag)]
    assert not missing and len(named) > 30, missing


def test_targets_of_make_and_extras_that_are_named_exist():
    pages = [(text, text.read_text(encoding="utf-8")) for text in texts() if text.suffix == ".md"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    asked = {(text, target) for text, content in pages for target in MAKE.findall(content)}
    missing = [f"{text}: make {target}" for text, target in asked if target not in targets]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    wanted = {
        (text, extra) for text, content in pages for names in EXTRAS.findall(content) for extra in names.split(",")
    }
    missing += [f"{text}: extra {extra}" for text, extra in wanted if extra not in extras]
    assert not missing and len(asked) > 10 and len(wanted) > 4, missing


def test_every_environment_variable_is_documented():
    sources = [*(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cpp", ".h"))]
    content = "\n".join(p.read_text(encoding="utf-8") for p in (*sources, ROOT / "setup.py", ROOT / "CMakeLists.txt"))
    read = {name for names in VARIABLE.findall(content) for group in names for name in group.split()}
    table = re.findall(
        r"^\| `(AFA_\w+)` \|", (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert read == set(table) and len(table) == len(read) > 8, read ^ set(table)
