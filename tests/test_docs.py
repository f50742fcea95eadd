"""Pages that say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from verl_prefix import presets

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_methods_is_read_off_the_presets():
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs/make_methods.py")
    make_methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_methods)
    page = (ROOT / "docs/methods.md").read_text()
    assert make_methods.BEGIN + make_methods.table() + make_methods.END in page, "run python docs/make_methods.py"


def test_the_readme_names_every_preset():
    named = set(re.findall(r"`(?:\+prefix=)?(\w+)`", (ROOT / "README.md").read_text()))
    assert set(presets.names()) <= named


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_keys_named_in_the_pages_exist(page):
    """`prefix.a.b` in a page is a key of the configuration."""
    from omegaconf import OmegaConf

    from verl_prefix.config import PrefixConfig

    schema = OmegaConf.create({"prefix": OmegaConf.to_container(OmegaConf.structured(PrefixConfig))})
    for key in re.findall(r"\bprefix\.[a-z_]+(?:\.[a-z_]+)+", page.read_text()):
        parent, _, leaf = key.rpartition(".")
        section = OmegaConf.select(schema, parent)
        assert section is not None, key
        assert leaf in section, key
