"""What the pages say of others' names holds, and the site has all of them."""

import dataclasses
import re
from pathlib import Path

import pytest

import fused_peft as fp
from fused_peft.methods import METHODS
from fused_peft.model import prompt

ROOT = Path(__file__).resolve().parent.parent
DOCS = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
COMING = DOCS["coming-from-peft.md"]


def section(page: str, heading: str) -> str:
    return page.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_the_site_has_every_page_once():
    """``make docs`` refuses links and headings that are not there; this needs no set-up."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert sorted(re.findall(r": docs/(\S+\.md)$", nav, re.M)) == sorted(DOCS)


def test_every_method_has_its_equation():
    table = DOCS["methods.md"].partition("| method | W' = |")[2].partition("\n\n")[0]
    firsts = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(firsts))) == sorted(METHODS)


def test_the_api_page_is_of_the_docstrings(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT / "bench")
    import api

    assert DOCS["api.md"] == api.page(), "run bench/api.py"


CONFIGS = [name for name in fp.__all__ if name.endswith("Config")]


@pytest.mark.parametrize("name", CONFIGS)
def test_help_of_a_config_shows_every_field(name):
    config = getattr(fp, name)
    entries = re.findall(r"^(\w+(?:, \w+)*): \S", config.__doc__, re.M)
    shown = {field for entry in entries for field in entry.split(", ")}
    assert not {f.name for f in dataclasses.fields(config)} - shown
    assert re.search(r"arXiv \d{4}\.\d{5}", config.__doc__) or issubclass(config, prompt.SoftPromptConfig)


def test_calls_that_moved_are_here():
    rows = re.findall(r"^\| (`.*) \| (.*`.*) \|$", section(COMING, "What moved"), re.M)
    assert len(rows) > 10
    for theirs, ours in rows:
        names = re.findall(r"fp\.(\w+)\(", ours)
        assert names, theirs
        assert set(names) <= set(fp.__all__)


def test_what_is_absent_is_named():
    peft = pytest.importorskip("peft")
    absent = section(COMING, "What is absent")
    theirs, ours = ({f.name for f in dataclasses.fields(lib.LoraConfig)} for lib in (peft, fp))
    of_the_file = {"auto_mapping", "peft_type", "peft_version"}
    assert set(re.findall(r"`(\w+)`", absent.partition("These methods")[0])) - ours >= theirs - ours - of_the_file
    assert set(re.findall(r"`(\w+)`", absent.partition("These methods")[0])) <= theirs
    soft = (prompt.PrefixTuningConfig, prompt.PromptTuningConfig, prompt.PromptEncoderConfig)
    known = {method.config.peft_type for method in METHODS.values()} | {config.peft_type for config in soft}
    there = re.findall(r"\b[A-Z][A-Z0-9_]{2,}\b", absent.partition("have no config here:")[2].partition(". Use")[0])
    assert set(there) == {kind.value for kind in peft.PeftType} - known


def test_defaults_are_peft_s_but_for_those_that_are_named():
    peft = pytest.importorskip("peft")
    for name in ("LoraConfig", "IA3Config", "VeraConfig", "DeloraConfig", "PrefixTuningConfig", "PromptTuningConfig"):
        ours, theirs = ({f.name: f.default for f in dataclasses.fields(getattr(lib, name))} for lib in (fp, peft))
        differ = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
        named = set(re.findall(r"`(\w+)`", section(COMING, "Names that differ")))
        assert {k for k in differ if not _alike(ours[k], theirs[k])} <= named, name


def _alike(a, b) -> bool:
    return a in (None, dataclasses.MISSING) and b in (None, dataclasses.MISSING)


def test_every_source_of_the_comparison_is_used_and_given():
    text, sources = DOCS["comparison.md"].split("## Sources")
    given = [int(n) for n in re.findall(r"^(\d+)\. ", sources, re.M)]
    used = {int(n) for found in re.findall(r"\[([\d, ]+)\]", text) for n in found.split(",")}
    assert given == sorted(used) == list(range(1, len(given) + 1))
