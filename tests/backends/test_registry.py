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


ONE_STORE = [
    ["sqlite:///a.db", "sqlite:///./b/../a.db", "sqlite:///a.db?timeout=6&synchronous=normal", "sqlite:///link.db"],
    ["sqlite:///b.db"],
    ["redis://host", "redis://u:p@HOST:6379/0", "valkey://host/?timeout=1", "rediss://host:6379/00"],
    ["redis://host/1"],
    ["redis://host:6380"],
    ["redis+unix:///run/a.sock", "redis+unix://u:p@/run/a.sock?timeout=1"],
    ["redis+cluster://a:6379,b:1", "rediss+cluster://u:p@b:1,a"],
    ["redis+cluster://a"],
    ["redis://a"],
    ["postgresql://host/db", "postgres://u:p@HOST:5432/db?sslmode=require&timeout=3", "postgresql:///db?host=host"],
    ["postgresql://host/other"],
    ["postgresql://host/db?schema=mine"],
    ["postgresql://other:1,host:2/db", "postgresql://host:2,other:1/db"],
    ["postgresql://other:2,host:1/db"],
]


def test_a_store_has_one_place_however_its_url_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who logs in, how, and how long to wait name no other store; another server, database, path or namespace does."""
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()
    Path("link.db").symlink_to("a.db")
    spelt = [[*ONE_STORE[0], f"sqlite:///{tmp_path / 'a.db'}"], *ONE_STORE[1:]]
    places = [{backend_factory(url)().place for url in urls} for urls in spelt]
    assert [len(found) for found in places] == [1] * len(places)
    assert len(set().union(*places)) == len(places)
    for urls in spelt:
        assert backend_factory(urls[0], namespace="another")().place not in set().union(*places)


def test_a_database_that_a_url_leaves_out_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the URL does not say is taken from the environment; without a database it is called like the user."""
    monkeypatch.setenv("PGHOST", "host")
    monkeypatch.setenv("PGDATABASE", "db")
    assert backend_factory("postgresql:///")().place == backend_factory("postgresql://host/db")().place
    monkeypatch.delenv("PGDATABASE")
    assert backend_factory("postgresql://u@host")().place == backend_factory("postgresql://host/u")().place


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
