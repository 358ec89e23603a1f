"""Ways to a server other than plain TCP: TLS, with its certificates, and sockets of the same machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from respan_guard.backends.postgres import PostgresBackend
from respan_guard.backends.redis import RedisBackend
from respan_guard.errors import ConfigurationError, GuardError, StorageUnavailable
from tests.backends import redis_server
from tests.backends.living import checked, live
from tests.backends.postgres_server import PostgresServer
from tests.backends.redis_server import Cluster, RedisServer
from tests.certificates import Authority

SAFE = ("appendonly yes", "appendfsync always")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs the servers' certificates."""
    return Authority(tmp_path_factory.mktemp("trusted"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that signed nothing."""
    return Authority(tmp_path_factory.mktemp("stranger"))


def refused(backend: RedisBackend | PostgresBackend) -> GuardError:
    """The error that opening gives."""

    async def opening() -> GuardError:
        with pytest.raises(GuardError) as caught:
            await backend.open()
        await backend.close()
        return caught.value

    return asyncio.run(opening())


# -- Redis -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_port(authority: Authority) -> Iterator[int]:
    """Where it speaks TLS; the certificate is for 127.0.0.1."""
    certificate, key = authority.sign("IP:127.0.0.1")
    port = redis_server.free_port()
    files = (f"tls-cert-file {certificate}", f"tls-key-file {key}", "tls-auth-clients no")
    server = RedisServer(f"tls-port {port}", *files, *SAFE, path=redis_server.tls_binary())
    yield port
    server.stop()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_a_redis_certificate_that_is_trusted(tls_port: int, authority: Authority, scheme: str) -> None:
    """`ssl_ca_certs` names its authority; everything works, and `respan-guard check` and `verify` too."""
    url = f"{scheme}://127.0.0.1:{tls_port}?ssl_ca_certs={authority.certificate}"
    asyncio.run(live(url, namespace=scheme))
    told = checked(url)
    assert told["ok"], told
    assert told["storage"]["url"] == f"{scheme}://127.0.0.1:{tls_port}"


@pytest.mark.parametrize(
    ("query", "because"), [("", "unable to get local issuer certificate"), ("?ssl_ca_certs={stranger}", "unable to")]
)
def test_a_redis_certificate_that_is_not_trusted(tls_port: int, stranger: Authority, query: str, because: str) -> None:
    """By nobody here, or not by the authority that is named: at start, and with the option that names one."""
    error = refused(RedisBackend(f"rediss://127.0.0.1:{tls_port}{query.format(stranger=stranger.certificate)}"))
    assert isinstance(error, ConfigurationError)
    assert f"the certificate of rediss://127.0.0.1:{tls_port} can't be trusted ({because}" in str(error)
    assert "?ssl_ca_certs=FILE names its authority" in str(error)


def test_a_redis_certificate_of_another_host(tls_port: int, authority: Authority) -> None:
    """The host is part of what is proven; `ssl_check_hostname=false` leaves it out, `ssl_cert_reqs=none` all."""
    url = f"rediss://localhost:{tls_port}?ssl_ca_certs={authority.certificate}"
    error = refused(RedisBackend(url))
    assert isinstance(error, ConfigurationError)
    assert "not valid for 'localhost'" in str(error)
    asyncio.run(live(f"{url}&ssl_check_hostname=false", namespace="unchecked"))
    asyncio.run(live(f"rediss://localhost:{tls_port}?ssl_cert_reqs=none", namespace="trusting"))


def test_a_redis_that_is_spoken_to_plainly(tls_port: int) -> None:
    """Plain to a port that speaks TLS: it can't be reached, and that is said at once."""
    error = refused(RedisBackend(f"redis://127.0.0.1:{tls_port}"))
    assert isinstance(error, StorageUnavailable)
    assert "can't be reached" in str(error)


def test_a_redis_that_wants_our_certificate(authority: Authority) -> None:
    """`ssl_certfile` and `ssl_keyfile` give it; without them the error says that one is wanted, each time.

    In TLS 1.3 a server says so only when the client takes the handshake for done (RFC 8446, 4.4.2.4) and has sent more:
    the connection's reset may then arrive first, and tells no reason.
    """
    certificate, key = authority.sign("IP:127.0.0.1")
    port = redis_server.free_port()
    files = (f"tls-cert-file {certificate}", f"tls-key-file {key}", f"tls-ca-cert-file {authority.certificate}")
    server = RedisServer(f"tls-port {port}", *files, "tls-auth-clients yes", path=redis_server.tls_binary())
    url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.certificate}"
    for _ in range(10):
        error = refused(RedisBackend(url))
        assert isinstance(error, ConfigurationError), error
        assert "wants a certificate of ours: ?ssl_certfile=FILE&ssl_keyfile=FILE" in str(error)
    own, own_key = authority.sign("DNS:app")
    asyncio.run(live(f"{url}&ssl_certfile={own}&ssl_keyfile={own_key}"))
    server.stop()


def test_a_redis_cluster_with_tls(authority: Authority, stranger: Authority) -> None:
    """`rediss+cluster://`: every node is spoken to in TLS, and its certificate is checked."""
    certificate, key = authority.sign("IP:127.0.0.1")
    files = (f"tls-cert-file {certificate}", f"tls-key-file {key}", f"tls-ca-cert-file {authority.certificate}")
    cluster = Cluster(options=("tls-auth-clients no", *files), tls=True)
    asyncio.run(live(f"{cluster.url}?ssl_ca_certs={authority.certificate}"))
    error = refused(RedisBackend(f"{cluster.url}?ssl_ca_certs={stranger.certificate}"))
    assert isinstance(error, ConfigurationError), error
    assert "can't be trusted" in str(error)
    for node in cluster.nodes:
        node.stop()


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("ssl_ca_certs=/no/such/file.pem", "ssl_ca_certs=/no/such/file.pem can't be read: No such file"),
        ("ssl_certfile=/no/such/file.pem", "ssl_certfile=/no/such/file.pem can't be read"),
        ("ssl_cert_reqs=maybe", "none, optional or required, got 'maybe'"),
    ],
)
def test_tls_options_that_can_not_work(query: str, says: str) -> None:
    """A file that is not there is no server that can't be reached."""
    for scheme in ("rediss", "rediss+cluster"):
        with pytest.raises(ConfigurationError, match=says):
            RedisBackend(f"{scheme}://127.0.0.1:1?{query}")
    with pytest.raises(ConfigurationError, match="unknown option"):
        RedisBackend(f"redis://127.0.0.1:1?{query}")


def test_redis_by_a_socket(tmp_path: Path) -> None:
    """`redis+unix:///path`: everything works; the wrong path, and a path without a server, are said."""
    server = RedisServer(*SAFE, "unixsocket redis.sock")
    path = server.directory / "redis.sock"
    url = f"redis+unix://{path}"
    asyncio.run(live(url))
    told = checked(url)
    assert told["ok"], told
    assert told["storage"]["url"] == url
    wrong = f"redis+unix://{tmp_path}/wrong.sock"
    error = refused(RedisBackend(wrong))
    assert isinstance(error, StorageUnavailable)
    assert f"{wrong} can't be reached" in str(error)
    assert "No such file" in str(error)
    server.kill()
    assert "can't be reached" in str(refused(RedisBackend(url)))
    server.stop()


# -- PostgreSQL ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_server(authority: Authority) -> Iterator[PostgresServer]:
    """The certificate is for `localhost`."""
    started = PostgresServer.with_tls(*authority.sign("DNS:localhost"))
    yield started
    started.delete()


def test_a_postgresql_certificate_that_is_trusted(tls_server: PostgresServer, authority: Authority) -> None:
    """`sslmode=verify-full&sslrootcert=FILE`: everything works, and `respan-guard check` and `verify` too."""
    url = f"postgresql://postgres@localhost:{tls_server.port}/postgres?sslmode=verify-full"
    asyncio.run(live(f"{url}&sslrootcert={authority.certificate}"))
    told = checked(f"{url}&sslrootcert={authority.certificate}")
    assert told["ok"], told


def test_a_postgresql_certificate_that_is_not_trusted(
    tls_server: PostgresServer, authority: Authority, stranger: Authority
) -> None:
    """Of another authority, for another host, or with none named: at start, and with the reason."""
    for host, root, because in (
        ("localhost", stranger.certificate, "certificate verify failed"),
        ("127.0.0.1", authority.certificate, 'server certificate for "localhost"'),
        ("localhost", "/no/such/file.pem", 'file "/no/such/file.pem" does not exist'),
    ):
        url = f"postgresql://postgres@{host}:{tls_server.port}/postgres?sslmode=verify-full&sslrootcert={root}"
        error = refused(PostgresBackend(url))
        assert isinstance(error, ConfigurationError)
        assert "can't be trusted" in str(error)
        assert because in str(error)


def test_a_tls_mode_that_there_is_not(tls_server: PostgresServer) -> None:
    """It is the URL that is wrong, not the server that is away."""
    error = refused(PostgresBackend(f"postgresql://postgres@localhost:{tls_server.port}/postgres?sslmode=maybe"))
    assert isinstance(error, ConfigurationError)
    assert "invalid sslmode value" in str(error)


def test_a_postgresql_without_tls(authority: Authority) -> None:
    """Asked for TLS, it says that it speaks none."""
    server = PostgresServer.newest()
    error = refused(PostgresBackend(f"{server.url}?sslmode=verify-full&sslrootcert={authority.certificate}"))
    assert isinstance(error, ConfigurationError)
    assert "speaks no TLS; see sslmode" in str(error)
    server.delete()


def test_postgresql_by_a_socket(tmp_path: Path) -> None:
    """`postgresql:///database?host=/directory`: everything works; the wrong directory is said."""
    server = PostgresServer.newest()
    server.configure(unix_socket_directories=str(server.directory))
    url = f"postgresql:///postgres?host={server.directory}&port={server.port}&user=postgres"
    asyncio.run(live(url))
    told = checked(url)
    assert told["ok"], told
    assert told["storage"]["url"] == url
    error = refused(PostgresBackend(url.replace(str(server.directory), str(tmp_path))))
    assert isinstance(error, StorageUnavailable)
    assert f'socket "{tmp_path}' in str(error)
    assert "No such file" in str(error)
    server.delete()
