"""From a URL to servers and the keys on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from respan_guard.errors import ConfigurationError
from respan_guard.urls import mask_url, split_url, unknown_option

__all__ = ["SHARDS", "Location", "locate"]

SHARDS = 16
"""Into how many parts a store is cut on a cluster. Part of the layout: another number is another store."""
_FORM = (
    "redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss:// for TLS, redis+cluster://HOST:PORT[,HOST:PORT] for a cluster"
)
_OWN = ("timeout",)
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = (*_TLS_FILES, "ssl_check_hostname", "ssl_cert_reqs")


@dataclass(frozen=True, slots=True)
class Location:
    """Where the store is.

    Attributes:
        url: As it was given, without the password and the options.
        address: As redis-py wants it.
        nodes: Host and port of nodes to ask about a cluster; empty for a single server.
        prefix: What all keys begin with; `{}` is the part of the store, and with it the hash slot.
        place: The same for each way to write where this is, with TLS and without, whoever logs in.
        timeout: Seconds that connecting, or an answer, may take.
    """

    url: str
    address: str = field(repr=False)
    nodes: tuple[tuple[str, int], ...]
    prefix: str
    place: str
    timeout: float

    @property
    def shards(self) -> int:
        """How many parts the store has."""
        return SHARDS if self.nodes else 1

    def keys(self, shard: int) -> tuple[str, ...]:
        """The keys that every script is called with: what makes a part a store, and on a cluster one that never is.

        While a slot moves to another node its keys go one by one. A script that found some of them and not the others
        would take what was spent for zero. With a key that is missing on both sides, both say to try again later.
        """
        prefix = self.prefix.replace("*", str(shard))
        return (f"{prefix}meta", f"{prefix}never") if self.nodes else (f"{prefix}meta",)


def locate(url: str, namespace: str, options: dict[str, Any]) -> Location:
    """Read a URL `redis://HOST:PORT/DB?timeout=5`; keywords go before the query.

    Raises:
        ConfigurationError: It names no server, or has an option that isn't known.
    """
    kind, _, form = url.partition("://")[0].partition("+")
    tls = kind in ("rediss", "valkeys")
    parts = split_url(url, _FORM)._replace(scheme="rediss" if tls else "redis")
    given = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **options}
    known = _OWN + (_TLS if tls else ())
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigurationError(f"{unknown_option(unknown, url)} of a Redis store; known: {', '.join(known)}")
    timeout = _seconds(given.pop("timeout", 5.0))
    _check_tls(given)
    shown = mask_url(url).partition("?")[0]
    name = quote(namespace, safe="")
    if form == "unix":
        if not parts.path.strip("/"):
            raise ConfigurationError(f"a Redis store on a socket is redis+unix:///path/of/redis.sock; got {shown}")
        address = urlunsplit(("unix", parts.netloc, parts.path, "", ""))
        prefix = f"respan:{{{name}}}:"
        return Location(shown, address, (), prefix, f"unix:{unquote(parts.path)}#{prefix}", timeout)
    hosts = parts.netloc.rpartition("@")[2]
    database = unquote(parts.path).strip("/")
    if not hosts or (database and not database.isdigit()):
        raise ConfigurationError(f"a Redis store is {_FORM}; got {shown}")
    if form == "cluster":
        if database not in ("", "0"):
            raise ConfigurationError(f"a Redis Cluster has no databases, leave /{database} out of {shown}")
        nodes = tuple(_node(host, shown) for host in hosts.split(","))
        netloc = parts.netloc.removesuffix(hosts) + hosts.split(",")[0]
        address = urlunsplit((parts.scheme, netloc, "", urlencode(given), ""))
        prefix = f"respan:{{{name}.*}}:"
        return Location(shown, address, nodes, prefix, f"redis:{sorted(set(nodes))}#{prefix}", timeout)
    node, prefix = _node(hosts, shown), f"respan:{{{name}}}:"
    address = urlunsplit((parts.scheme, parts.netloc, f"/{database}", urlencode(given), ""))
    return Location(shown, address, (), prefix, f"redis:{node}/{int(database or 0)}#{prefix}", timeout)


def _check_tls(given: dict[str, Any]) -> None:
    """Name what is wrong here: a connection would say that the server can't be reached."""
    for name in _TLS_FILES:
        try:
            with Path(given[name]).open("rb"):
                pass
        except KeyError:
            continue
        except OSError as error:
            raise ConfigurationError(f"{name}={given[name]} can't be read: {error.strerror}") from None
    if given.get("ssl_cert_reqs", "none") not in ("none", "optional", "required"):
        raise ConfigurationError(f"ssl_cert_reqs is none, optional or required, got {given['ssl_cert_reqs']!r}")


def _node(host: str, shown: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"redis://{host}")
        if parts.hostname:
            return parts.hostname, parts.port or 6379
    except ValueError:
        pass
    raise ConfigurationError(f"a Redis store is {_FORM}; got {shown}, in which a HOST:PORT is none")


def _seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 60:
        raise ConfigurationError(f"timeout must be seconds above 0, at most 60, got {value!r}")
    return seconds
