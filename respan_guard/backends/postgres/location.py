"""From a URL to a server, a schema and how long to wait."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit

import psycopg
from psycopg import conninfo, pq

from respan_guard.errors import ConfigurationError

__all__ = ["Location", "locate"]

_FORM = "postgresql://user:password@host:5432/database"
_NAME = r"(?!pg_)[A-Za-z0-9_.-]{1,63}"  # 63 bytes of a name are kept
_OURS = frozenset({"schema", "timeout"})


@dataclass(frozen=True, slots=True)
class Location:
    """Where the store is.

    Attributes:
        shown: The URL as it may be shown: without the password.
        conninfo: What the driver connects with.
        schema: Holds the tables; one for each namespace.
        place: The same for each way to write where this is, whoever logs in.
        timeout: Seconds that a statement may take, the waiting for locks included.
    """

    shown: str
    conninfo: str
    schema: str
    place: str
    timeout: float


def locate(url: str, namespace: str, options: dict[str, Any]) -> Location:
    """Read a URL; our own options stand in its query beside the driver's, keywords go before.

    Raises:
        ConfigurationError: It is no URL of PostgreSQL, or an option isn't known or can't be.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"a PostgreSQL store is {_FORM}; got {_masked(url)!r}")
    unknown = sorted(set(options) - _OURS)
    if unknown:
        raise ConfigurationError(f"unknown option {unknown[0]!r} of a PostgreSQL store; known: schema, timeout")
    query = parse_qsl(parts.query, keep_blank_values=True)
    given = {**{name: value for name, value in query if name in _OURS}, **options}
    rest = urlencode([pair for pair in query if pair[0] not in _OURS], quote_via=quote)
    bare = _joined(parts, parts.netloc, rest)
    ports = [host.rpartition("]")[2].partition(":")[2] for host in parts.netloc.rpartition("@")[2].split(",")]
    if any(port and not port.isdigit() for port in ports):
        raise ConfigurationError(f"{_masked(url)!r} has a port that is no number; it is {_FORM}")
    try:
        place = _place(conninfo.conninfo_to_dict(bare))
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(f"{_masked(url)!r} can't be used: {str(error).strip()}; it is {_FORM}") from None
    try:
        timeout = float(given.get("timeout", 5.0))
    except (TypeError, ValueError):
        timeout = math.nan
    if not 0.01 <= timeout <= 3600:
        raise ConfigurationError(f"timeout must be seconds from 0.01 to 3600, got {given['timeout']!r}")
    schema = str(given.get("schema", "respan_guard"))
    if namespace != "default":
        schema = f"{schema}_{namespace}"
    if not re.fullmatch(_NAME, schema):
        raise ConfigurationError(
            f"{schema!r} can't name a schema: 1 to 63 letters, digits, dots, dashes and underscores, not pg_..."
        )
    return Location(_masked(bare), bare, schema, f"{place}#{schema}", timeout)


def _place(given: dict[str, Any]) -> str:
    """Servers and database, with what libpq fills in where the URL is silent: from the environment, or its own."""
    defaults = {str(option.keyword, "utf-8"): option.val for option in pq.Conninfo.get_defaults()}
    filled = {name: str(value, "utf-8", "replace") for name, value in defaults.items() if value is not None} | given
    names = str(filled.get("hostaddr") or filled.get("host") or "").split(",")
    hosts = [name if name.startswith("/") else name.lower() for name in names]
    ports = str(filled.get("port") or "").split(",")
    ports = [port or "5432" for port in ports * (len(hosts) if len(ports) == 1 else 1)]
    database = filled.get("dbname") or filled.get("user")
    return f"postgresql:{sorted(itertools.zip_longest(hosts, ports, fillvalue=''))}/{database}/{filled.get('service')}"


def _masked(url: str) -> str:
    """The URL without its password, wherever that stands."""
    parts = urlsplit(url)
    netloc = parts.netloc
    if "@" in netloc:
        user, _, host = netloc.rpartition("@")
        netloc = f"{user.partition(':')[0]}:***@{host}" if ":" in user else netloc
    query = [(name, "***" if "password" in name else value) for name, value in parse_qsl(parts.query)]
    return _joined(parts, netloc, urlencode(query, safe="*/"))


def _joined(parts: SplitResult, netloc: str, query: str) -> str:
    """The URL again. Without a host, as for a socket, it keeps its `//`; `urlunsplit` would take them away."""
    behind = (f"?{query}" if query else "") + (f"#{parts.fragment}" if parts.fragment else "")
    return f"{parts.scheme}://{netloc}{parts.path}{behind}"
