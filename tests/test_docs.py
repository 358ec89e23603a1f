"""The pages under docs/ are true: their Python runs, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there."""
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_python_on_the_pages_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs, one after another. (The README's have a test of their own.)"""
    monkeypatch.setenv("GUARD_API_KEY", "a reader's own")
    sybil = Sybil(parsers=[CodeBlockParser("python", evaluator=lambda example: None)])
    names: dict[str, object] = {}
    ran = 0
    for example in sybil.parse(page).examples():
        exec(compile(example.parsed, f"{page.name}:{example.line}", "exec"), names)
        ran += 1
    assert ran == page.read_text().count("```python")
