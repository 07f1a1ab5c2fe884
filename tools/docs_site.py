"""``make docs``: collects the pages of the repository for mkdocs, writes the API reference, and builds the site.

Every page stays where it lies in the repository, with the files that it links to. A link to a folder becomes plain
text: a site has no listing of one.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "examples/README.md", "bench/README.md",
    "experiments/README.md", "experiments/results/*.md",
)  # fmt: skip
# What people import from; a name is public where it stands in the __all__ of one of these.
MODULES = ("afa_kernels", "afa_kernels.peft", "afa_kernels.callbacks")
# Of workflows: GitHub finds them from where it shows the README.
_BADGES = re.compile(r"(?:^\[!\[.*\n)+\n", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def public_names() -> dict[str, list[str]]:
    """Return what each module makes public, by the full names of where it is defined. ``afa_kernels.plan`` is a module,
    the function is ``afa_kernels.plan.plan``."""
    return {name: [_defined(name, public) for public in importlib.import_module(name).__all__] for name in MODULES}


def _defined(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    return f"{value.__module__}.{value.__qualname__}"


def collect(stage: Path) -> None:
    """Write the pages, the files that they link to and the API reference into ``stage``."""
    shutil.rmtree(stage, ignore_errors=True)
    for pattern in PAGES:
        for page in sorted(ROOT.glob(pattern)):
            target = stage / page.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = _BADGES.sub("", page.read_text())
            target.write_text(_LINK.sub(lambda link, page=page: _staged(link, page, stage), text))
    (stage / "api.md").write_text(reference())


def _staged(link: re.Match, page: Path, stage: Path) -> str:
    """Return a link of a page as the site has it, and bring the file along that it names."""
    _, text, address, _ = link.groups()
    if "://" in address:
        return link[0]
    file = (page.parent / address).resolve()
    if file.is_dir():
        return text
    if file.is_file() and file.suffix != ".md":
        target = stage / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return link[0]  # mkdocs checks it


def reference() -> str:
    """Return the page of the public names, from their docstrings."""
    lines = ["# API reference", "", "Every name here keeps its meaning within a major version.", ""]
    for module, names in public_names().items():
        lines += [f"## `{module}`", ""]
        for name in names:
            lines += [f"::: {name}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs_site", description="builds the site")
    parser.add_argument("--serve", action="store_true", help="serve it on localhost instead")
    parser.add_argument("--into", type=Path, default=ROOT / "build", help="folder of the site (default: build)")
    arguments = parser.parse_args(argv)
    stage = arguments.into / "docs"
    collect(stage)
    environment = os.environ | {"DOCS": str(stage), "NO_MKDOCS_2_WARNING": "1"}  # of the theme, about its successor
    mkdocs = [sys.executable, "-m", "mkdocs"]
    if arguments.serve:
        return subprocess.run([*mkdocs, "serve"], cwd=ROOT, env=environment).returncode
    # Not --quiet: with it mkdocs does not count the warnings that --strict makes errors of.
    command = [*mkdocs, "build", "--clean", "--site-dir", str(arguments.into / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
