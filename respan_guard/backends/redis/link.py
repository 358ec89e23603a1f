"""Connections to a server or a cluster, and scripts run over them."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ClusterError,
    ConnectionError,  # noqa: A004 - theirs
    NoScriptError,
    RedisClusterException,
)

from respan_guard.backends.redis.demoted import Renewal, refuses_writes, renewing
from respan_guard.backends.redis.failures import FAILURES, translated
from respan_guard.backends.redis.line import Line
from respan_guard.backends.redis.location import Location
from respan_guard.backends.redis.scripts import AGAIN, script
from respan_guard.errors import ConfigurationError

__all__ = ["Link"]

_TRIES = 4
_LISTENING = 1.0  # seconds
_PAUSE = 0.005  # seconds before the second try, twice that before the third
_LOST = (AttributeError, TypeError)  # to write to a connection that was just closed: its parts are None (CPython, too)
_PASSING = (ConnectionError, ClusterError, *_LOST)  # what another try may mend
logger = logging.getLogger("respan_guard")


_forgotten: list[Any] = []


def _connections(client: Any) -> list[Any]:
    """All connections of a client."""
    if isinstance(client, RedisCluster):
        return [connection for node in client.get_nodes() for connection in getattr(node, "_connections", ())]
    pool = getattr(client, "connection_pool", None)
    lists = (getattr(pool, name, ()) for name in ("_available_connections", "_in_use_connections"))
    return [connection for some in lists for connection in some]


def _let_go(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, *, forked: bool) -> None:
    if not forked and not loop.is_closed():
        if _running_loop() is loop:
            transport.abort()
        else:
            loop.call_soon_threadsafe(transport.abort)  # if it ever runs again
    else:
        wrapped = getattr(transport.get_extra_info("socket"), "_sock", None)
        if wrapped is not None:
            wrapped.close()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Client(Protocol):
    async def execute_command(self, *args: Any, **options: Any) -> Any: ...

    async def aclose(self) -> None: ...


class Link:
    """Runs scripts on the parts of a store. Nothing is ever sent twice behind the caller's back.

    redis-py's retries are off: after a lost reply it would send a command again on its own. Here the caller does that,
    with the same ids. A script that a server does not know was not run; it is sent along and run then.
    """

    def __init__(self, at: Location) -> None:
        self.at = at
        self._client: _Client | None = None
        self._line: Line | None = None  # of a single server, for batches
        self._renewal = Renewal()
        self._failures = 0
        self.opening = True

    async def connect(self) -> None:
        """Make the client; connections are made when first needed."""
        at, self._loop, self._pid = self.at, asyncio.get_running_loop(), os.getpid()
        given: dict[str, Any] = {
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": at.timeout,
            "socket_connect_timeout": at.timeout,
            "decode_responses": True,
            "driver_info": None,  # two commands fewer for each new connection
            "protocol": 2,  # replies of scripts are the same in 3, which costs a round trip more to begin with
        }
        if not at.nodes:
            self._client = Redis.from_url(at.address, **given)
            self._renewal = renewing(self._client)
            self._line = Line(at.address, at.timeout, given)
            return
        parts = urlsplit(at.address)
        nodes = [ClusterNode(host, port) for host, port in at.nodes]
        login: dict[str, Any] = {
            "username": parts.username and unquote(parts.username),
            "password": parts.password and unquote(parts.password),
            "ssl": parts.scheme == "rediss",
            **dict(parse_qsl(parts.query)),
        }
        if "ssl_check_hostname" in login:
            login["ssl_check_hostname"] = login["ssl_check_hostname"].lower() in ("1", "true", "yes")
        # A slot that moved is followed one by one. Every so many (5) redis-py would close the connections of all nodes
        # instead, those that others wait on, too.
        cluster = RedisCluster(startup_nodes=nodes, reinitialize_steps=0, **login, **given)
        try:
            await cluster.initialize()
        except FAILURES as error:
            await cluster.aclose()
            if isinstance(error, RedisClusterException) and "not enabled" in str(error):
                raise ConfigurationError(f"{at.url} is a single server; write redis:// for redis+cluster://") from error
            raise translated(error, at.url, opening=True) from error
        self._client = cluster

    async def close(self) -> None:
        """Give the connections back."""
        client, self._client = self._client, None
        line, self._line = self._line, None
        if client is not None:
            try:
                if line is not None:
                    await line.close()
                await client.aclose()
            except FAILURES as error:
                logger.debug("closing a connection to %s failed: %s", self.at.url, error)
            await asyncio.sleep(0)  # a transport that was closed without waiting ends with the loop's next pass

    def abandon(self) -> None:
        """Let go of the connections without a word: their loop, or the process that made them, is gone.

        Neither redis-py nor asyncio has a way to do that: closing is the loop's work, and after a fork would take the
        parent's sockets out of the parent's own selector. What knew such a socket is kept from being collected.
        """
        client, self._client = self._client, None
        line, self._line = self._line, None
        for connection in (*_connections(client), *([] if line is None else [line.connection])):
            writer = getattr(connection, "_writer", None)
            if writer is not None:
                connection._writer = connection._reader = None
                _let_go(writer.transport, self._loop, forked=os.getpid() != self._pid)
                _forgotten.append(writer)

    @property
    def is_open(self) -> bool:
        """Whether there is a client."""
        return self._client is not None

    def way(self, shard: int) -> object:
        """What the next batch of a part goes over, as it looks now. Another one may lead to another server.

        On a cluster that is a node, and its connections; as a client that fails at one node closes those of all, any
        failure counts.
        """
        if self._line is not None:
            return self._line.number
        client = self._client
        if not isinstance(client, RedisCluster):
            return None
        try:
            node = client.nodes_manager.get_node_from_slot(client.keyslot(self.at.keys(shard)[0]))
        except RedisClusterException:  # nobody has the slot
            return None
        readers = [getattr(connection, "_reader", None) for connection in getattr(node, "_connections", ())]
        ended = sum(reader is not None and reader.at_eof() for reader in readers)
        return node.name, self._failures, ended

    async def tell(self, *words: Any) -> dict[str, Any]:
        """Run a command on every primary, and answer by server."""
        client = self._client
        assert client is not None
        try:
            if not isinstance(client, RedisCluster):
                return {self.at.url: await client.execute_command(*words)}
            found = {}
            for node in client.get_primaries():
                found[node.name] = await client.execute_command(*words, target_nodes=node)
            return found
        except (*FAILURES, *_LOST) as error:
            self._failures += 1
            if self.opening and isinstance(error, ConnectionError):
                error = await self._said(client) or error
            raise translated(error, self.at.url, opening=self.opening) from error

    async def _said(self, client: Any) -> OSError | None:
        """Why a server hung up, if it says so to one who only listens.

        In TLS 1.3 it refuses a client's certificate, or the lack of one, after the client has taken the handshake for
        done (RFC 8446, 4.4.2.4). If our first words cross that, the connection is reset and the alert lost.
        """
        if self.at.nodes or not self.at.address.startswith("rediss:"):
            return None
        arguments = client.connection_pool.make_connection()._connection_arguments()
        try:
            async with asyncio.timeout(_LISTENING):
                reader, writer = await asyncio.open_connection(**arguments)
                try:
                    await reader.read(1)
                finally:
                    writer.close()
        except TimeoutError:
            return None
        except OSError as error:
            return error
        return None

    async def run(self, name: str, shard: int, *arguments: Any) -> Any:
        """Run a script on a part of the store."""
        assert self._client is not None
        execute, wanted, keys = self._client.execute_command, script(name), self.at.keys(shard)
        if name == "apply" and self._line is not None:
            execute = self._line.execute
        # A batch may run twice as well: the store knows its ids. A line looks before it sends, pools don't.
        tries = _TRIES if name in AGAIN or (name == "apply" and self._line is None) else 1
        command, what, failures = "EVALSHA", wanted.sha, 0
        while True:
            try:
                return await execute(command, what, len(keys), *keys, *arguments)
            except NoScriptError:
                command, what = "EVAL", wanted.source  # which loads it, too
            except (*FAILURES, *_LOST) as error:
                failures += 1
                self._failures += 1
                if refuses_writes(error):
                    self._renewal.count += 1
                # A connection may have died while nobody used it, on a cluster several of them. There redis-py also
                # closes, for a failed command, connections that others are about to use (`None` has no `writelines`),
                # and follows a slot that is on the move too fast.
                if failures == tries or not isinstance(error, _PASSING) or isinstance(error, ClusterDownError):
                    raise translated(error, self.at.url, opening=self.opening) from error
                await asyncio.sleep(_PAUSE * 2 ** (failures - 1))

    async def run_all(self, name: str, *arguments: Any) -> list[Any]:
        """Run a script on every part of the store."""
        if not self.at.nodes:
            return [await self.run(name, 0, *arguments)]
        return list(await asyncio.gather(*[self.run(name, shard, *arguments) for shard in range(self.at.shards)]))
