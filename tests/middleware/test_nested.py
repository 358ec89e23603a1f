"""Doors of several guards around one app: each guard admits, books and ends a request once."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from tests.middleware.support import App, call, gateway, make_guard, provider


@pytest.mark.parametrize("order", ["A", "AA", "AB", "ABA", "BABA", "ABAB", "ABCABC"])
async def test_each_guard_counts_once(order: str) -> None:
    """However often its doors come, and whichever other ones stand between."""
    guards = {name: make_guard() for name in order}
    app: App = provider
    for name in reversed(order):
        app = gateway(app, guards[name][0])
    exchange = await call(app, customer="org_1")
    assert exchange.status == 200
    for _, ledger in guards.values():
        assert len(ledger.admits) == 1
        assert ledger.kinds == ["usage"]
        await ledger.settled(1)
    names = [name for name, _ in exchange.started["headers"]]
    assert names.count(b"ratelimit") == len(guards)


async def test_a_second_try_within_other_doors_is_a_new_request() -> None:
    """Passages that are over are not joined, and the ones around them still are."""
    outer, one = make_guard()
    inner, two = make_guard()
    chains: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        depth, passage = 0, scope["respan_guard"]
        while passage is not None:
            depth, passage = depth + 1, passage.outer
        chains.append(depth)
        await provider(scope, receive, send)

    tried = gateway(gateway(app, outer), inner)

    async def again(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()

        async def same() -> Any:
            return message

        async def unsent(message: Any) -> None:
            """The first tries are for nobody."""

        for _ in range(3):
            await tried(scope, same, unsent)
        await tried(scope, same, send)

    await call(gateway(again, outer), customer="org_1")
    await one.settled(1)
    await two.settled(4)
    assert chains == [2] * 4


def test_websockets_count_once() -> None:
    """Connections, too."""
    first, one = make_guard()
    second, two = make_guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        await websocket.close()

    door = gateway(gateway(gateway(app, first), second), first)
    with TestClient(door).websocket_connect("/v1/ws", headers={"x-customer": "org_1"}):
        pass
    assert (len(one.admits), len(two.admits)) == (1, 1)
