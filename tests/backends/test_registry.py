"""From URLs to backends."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from respan_guard.backends import registry
from respan_guard.backends.memory import MemoryBackend
from respan_guard.backends.registry import backend_factory
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.errors import ConfigurationError


class PluginBackend(MemoryBackend):
    """Stands for another package's."""

    shared = False

    def __init__(self, url: str, *, namespace: str = "default", flavour: str = "") -> None:
        super().__init__("memory://")
        self.given = (url, namespace, flavour)


def plug_in(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """As if a package with that entry point were installed."""
    points = EntryPoints([EntryPoint("toy", value, "respan_guard.backends")])
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


def test_memory_is_one_store_per_factory() -> None:
    """A factory gives the same store always; another factory another one."""
    factory = backend_factory("memory://", max_customers=5)
    assert factory() is factory()
    assert factory() is not backend_factory("memory://")()


def test_sqlite_is_one_instance_per_call(tmp_path: Path) -> None:
    """Each event loop has its own."""
    factory = backend_factory(f"sqlite:///{tmp_path / 'guard.db'}")
    assert isinstance(factory(), SQLiteBackend)
    assert factory() is not factory()


def test_a_package_adds_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point; it is given URL, namespace and options."""
    plug_in(monkeypatch, f"{__name__}:PluginBackend")
    made = backend_factory("toy://x?y", namespace="prod", flavour="sour")()
    assert isinstance(made, PluginBackend)
    assert made.given == ("toy://x?y", "prod", "sour")


def test_an_unknown_scheme_lists_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in ones, and those of other packages."""
    plug_in(monkeypatch, f"{__name__}:PluginBackend")
    with pytest.raises(ConfigurationError, match=r"mongo://; known: memory://, sqlite://, toy://"):
        backend_factory("mongo://localhost")


@pytest.mark.parametrize("url", ["guard.db", "", "sqlite:guard.db", "memory"])
def test_what_is_no_url_is_refused(url: str) -> None:
    """With an example of one."""
    with pytest.raises(ConfigurationError, match=r"sqlite:///guard\.db"):
        backend_factory(url)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    plug_in(monkeypatch, "no_such_module:Backend [toy]")
    with pytest.raises(ConfigurationError, match=r"no_such_module.*pip install 'respan-guard\[toy\]'"):
        backend_factory("toy://x")
