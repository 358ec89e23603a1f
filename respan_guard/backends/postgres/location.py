"""From a URL to a server, a schema and how long to wait."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import psycopg
from psycopg import conninfo, pq

from respan_guard.errors import ConfigurationError
from respan_guard.urls import ENCODED, mask_url, split_url, unknown_option

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
    conninfo: str = field(repr=False)
    schema: str
    place: str
    timeout: float


def locate(url: str, namespace: str, options: dict[str, Any]) -> Location:
    """Read a URL; our own options stand in its query beside the driver's, keywords go before.

    Raises:
        ConfigurationError: It is no URL of PostgreSQL, or an option isn't known or can't be.
    """
    parts = split_url(url, _FORM)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"a PostgreSQL store is {_FORM}; got {mask_url(url)}")
    unknown = sorted(set(options) - _OURS)
    if unknown:
        raise ConfigurationError(f"{unknown_option(unknown, url)} of a PostgreSQL store; known: schema, timeout")
    query = parse_qsl(parts.query, keep_blank_values=True)
    given = {**{name: value for name, value in query if name in _OURS}, **options}
    bare = [pair for pair in query if pair[0] not in _OURS]
    unknown = sorted(
        {name for name, _ in bare} - {str(option.keyword, "utf-8") for option in pq.Conninfo.get_defaults()}
    )
    if unknown:
        raise ConfigurationError(f"{unknown_option(unknown, url)} of PostgreSQL's client, and it is none of ours")
    rest = urlencode(bare, safe="/", quote_via=quote)
    # Without a host, as for a socket, it keeps its `//`; `urlunsplit` would take them away.
    address = f"{parts.scheme}://{parts.netloc}{parts.path}{f'?{rest}' if rest else ''}"
    # libpq's user ends at the first @, Python's at the last.
    driver = _parsed(address) if parts.netloc.count("@") < 2 else None
    if driver is None:
        raise ConfigurationError(f"{mask_url(url)} can't be used: {ENCODED}; it is {_FORM}")
    place = _place(driver)
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
    return Location(mask_url(address), address, schema, f"{place}#{schema}", timeout)


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


def _parsed(address: str) -> dict[str, Any] | None:
    try:
        return conninfo.conninfo_to_dict(address)
    except (psycopg.Error, ValueError):  # its text quotes what it could not read
        return None
