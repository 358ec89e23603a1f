"""Webhooks over TLS: the certificate must be for the URL's host and of a trusted authority, or nothing is sent."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from respan_guard.exporters import WebhookExporter
from respan_guard.testing import FakeClock
from tests.certificates import Authority

from .conftest import MakeGuard
from .sink import Sink, book, check_nothing_is_lost, dead, delivery, pending
from .test_webhook import SECRET, delivered

NAME = "hooks.example"


@asynccontextmanager
async def secured(authority: Authority, *names: str) -> AsyncIterator[tuple[Sink, list[str]]]:
    """A server whose certificate is for these names, and what names it was asked for."""
    asked: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.sign(*names))
    context.sni_callback = lambda connection, name, its: asked.append(name)
    async with Sink(tls=context) as sink:
        yield sink, asked


def exporter_to(sink: Sink, *, checked: bool) -> WebhookExporter:
    """By its address, or by a name that is looked up and whose address is looked at."""
    if checked:
        return WebhookExporter(f"https://{NAME}:{sink.port}/hook", SECRET)
    return WebhookExporter(sink.url, SECRET, allow_private=True)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads to this machine, which counts as public."""
    real = asyncio.BaseEventLoop.getaddrinfo

    async def looked_up(self: asyncio.BaseEventLoop, host: Any, port: Any, **how: Any) -> Any:
        if host == NAME:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        return await real(self, host, port, **how)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", looked_up)
    monkeypatch.setattr("respan_guard.exporters.http.is_public", lambda address: address == "127.0.0.1")


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that the environment names."""
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
    return made


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("checked", [False, True], ids=["by address", "by a name that is looked at"])
async def test_a_certificate_that_is_trusted(make_guard: MakeGuard, trusted: Authority, checked: bool) -> None:
    """Records arrive; a name is asked for as itself, although the connection goes to the address that was looked at."""
    async with secured(trusted, f"DNS:{NAME}" if checked else "IP:127.0.0.1") as (sink, asked), make_guard() as guard:
        ids = await book(guard, 3)
        way = delivery(guard, exporter_to(sink, checked=checked))
        await way.step()
        await way.close()
        assert delivered(sink) == set(ids)
        assert await pending(guard, "webhook") == set()
        if checked:
            assert asked == [NAME]
            assert sink.posted[0].headers["host"] == f"{NAME}:{sink.port}"


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("checked", [False, True], ids=["by address", "by a name that is looked at"])
@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_a_certificate_that_is_not_trusted(
    make_guard: MakeGuard, clock: FakeClock, trusted: Authority, tmp_path: Path, checked: bool, wrong: str
) -> None:
    """Of another authority, or for another name than the URL's: not a byte of a record is sent, nothing is a dead
    letter, and all arrive once it is mended. That the certificate is for the address does not help the name.
    """
    right = f"DNS:{NAME}" if checked else "IP:127.0.0.1"
    other = "IP:127.0.0.1" if checked else f"DNS:{NAME}"
    signer = Authority(tmp_path, "stranger") if wrong == "authority" else trusted
    async with make_guard() as guard:
        ids = await book(guard, 3)
        async with secured(signer, right if wrong == "authority" else other) as (sink, _):
            way = delivery(guard, exporter_to(sink, checked=checked))
            for _ in range(3):
                clock.advance(await way.step())
                await check_nothing_is_lost(guard, "webhook", set())
            await way.close()
            assert way.error is not None
            assert "certificate verify failed" in way.error
            assert sink.posted == []
            assert await pending(guard, "webhook") == set(ids)
            assert await dead(guard, "webhook") == {}
        async with secured(trusted, right) as (sink, _):
            way = delivery(guard, exporter_to(sink, checked=checked))
            await way.step()
            await way.close()
            assert delivered(sink) == set(ids)


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["not there", "no certificate"])
async def test_authorities_that_can_not_be_read(
    make_guard: MakeGuard, trusted: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """A file that the environment names and that is none is told, and tried again: it may be put there yet."""
    named = tmp_path / "own.pem"
    if content is not None:
        named.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(named))
    async with secured(trusted, "IP:127.0.0.1") as (sink, _), make_guard() as guard:
        ids = await book(guard, 1)
        way = delivery(guard, exporter_to(sink, checked=False))
        await way.step()
        assert way.error is not None
        assert "what SSL_CERT_FILE or SSL_CERT_DIR names can't be used" in way.error
        named.write_text(trusted.certificate.read_text())
        for _ in range(3):
            guard.clock.advance(60)  # type: ignore[attr-defined]  # a clock of tests
            await way.step()
        await way.close()
        assert delivered(sink) == set(ids)
