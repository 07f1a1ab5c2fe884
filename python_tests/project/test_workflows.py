"""The workflows of .github: valid, and made of the targets that run here too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.dependabot": [ROOT / ".github/dependabot.yml"],
    "vendor.github-issue-forms": [ROOT / ".github/ISSUE_TEMPLATE/bug.yml"],
}
# What a release does beside: build the source distribution and publish.
OTHER_COMMANDS = ("pipx run build --sdist", "gh release create")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(workflow: Path) -> list[str]:
    return re.findall(r"^ *- run: (.+)$", workflow.read_text(), re.MULTILINE)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_file_is_valid(schema):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, SCHEMAS[schema])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_is_a_target_of_the_makefile(workflow):
    found = commands(workflow)
    assert found
    for command in found:
        if not command.startswith(OTHER_COMMANDS):
            program, target, *_ = command.split()
            assert program == "make" and target in targets(), command


def test_what_the_project_asks_of_a_change_is_in_the_workflow():
    asked = {line.split()[1] for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")}
    in_workflows = {c.split()[1] for workflow in WORKFLOWS for c in commands(workflow) if c.startswith("make ")}
    assert asked - in_workflows == {"wheel-check"}  # release.yml tests the wheels as installed


def test_the_newest_torch_is_that_of_the_makefile():
    newest = re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f'"{newest}"' in (ROOT / ".github/workflows/tests.yml").read_text()
