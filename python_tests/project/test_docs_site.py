"""The site of the documentation: it builds without a warning, and its reference has every public name."""

import importlib
import inspect
import re

import pytest

from tools import docs_site

pytest.importorskip("mkdocstrings")

NAMES = [name for names in docs_site.public_names().values() for name in names]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    assert docs_site.main(["--into", str(folder)]) == 0  # a link that leads nowhere is an error
    return folder / "site"


@pytest.fixture(scope="module")
def anchors(site):
    return set(re.findall(r'id="(afa_kernels[\w.]*)"', (site / "api.html").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_says_what_it_is(name):
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    assert inspect.getdoc(value), name


def test_every_public_name_is_in_the_reference(anchors):
    assert set(NAMES) <= anchors


def test_the_reference_has_what_layers_inherit(anchors):
    alike = {"alpha_t", "merged", "set_alpha_t", "weight"}
    for layer, own in (
        ("layers.linear.AFALinear", {"merge", "unmerge", "plan"}),
        ("experts.layer.AFAExpertLinear", {"merge", "unmerge"}),
        ("layers.stack.AFALinearStack", {"add_adapter"}),
        ("experts.stack.AFAExpertStack", {"add_adapter"}),
    ):
        named = {name.rpartition(".")[2] for name in anchors if name.startswith(f"afa_kernels.{layer}.")}
        assert alike | own <= named, layer
        assert not named & {"call", "coefficient", "linear_call", "merge_checked", "write_alpha_t"}, layer


def test_every_page_is_in_the_menu():
    menu = (docs_site.ROOT / "mkdocs.yml").read_text()
    pages = {f"docs/{page.name}" for page in (docs_site.ROOT / "docs").glob("*.md")}
    assert pages and pages <= set(re.findall(r"docs/\w+\.md", menu))


def test_references_in_docstrings_are_links(site):
    text = (site / "api.html").read_text()
    assert ":func:" not in text and ":class:" not in text
    assert 'href="#afa_kernels.operator.functional.afa_lora"' in text


def test_a_page_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not loaded, (page, loaded)
