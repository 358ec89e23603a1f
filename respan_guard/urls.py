"""Storage URLs: read where there is no doubt, and shown without what is secret in them.

A password with an unescaped `/`, `#`, `?`, `[` or `@` moves the borders between the parts of its URL, and parsers then
quote a piece of it in what they raise. So nothing of a URL is shown that could be such a piece, no parser's text goes
on, and its exception is not even the context of ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import SplitResult, urlsplit

from respan_guard.errors import ConfigurationError

__all__ = ["ENCODED", "SCHEME", "UNSHOWN", "mask_url", "split_url", "unknown_option"]

ENCODED: Final = (
    "a port is a number, and user and password must be percent-encoded: @ as %40, / as %2F, : as %3A, ? as %3F,"
    " # as %23, [ as %5B, ] as %5D, % as %25"
)
"""What is wrong with most URLs that can't be read."""
UNSHOWN: Final = "\u2026"
SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
"""What a URL begins with."""
_FILE = re.compile(r"[\w./-]*\.(?:db|sqlite3?)")
_HOST = re.compile(r"(?:(?:[\w.-]|%[0-9a-f]{2})*|\[[0-9a-z:.%_-]+\])(?::(\d{1,5})?)?", re.IGNORECASE)
_VALUE = re.compile(r"[\w./:,*-]*")
_SECRET = frozenset({"password", "sslpassword"})
_PLAIN = frozenset(
    {
        "application_name",
        "channel_binding",
        "connect_timeout",
        "dbname",
        "gssencmode",
        "host",
        "hostaddr",
        "load_balance_hosts",
        "port",
        "schema",
        "service",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "sslcert",
        "sslkey",
        "sslmode",
        "sslrootcert",
        "synchronous",
        "target_session_attrs",
        "timeout",
        "user",
    }
)


def mask_url(url: str) -> str:
    """A storage URL fit for logs and messages: what could be a password, or a piece of one, is left out.

    Only the scheme is left where it is in doubt what is what.
    """
    found = SCHEME.match(url)
    if found is None:
        return url if _FILE.fullmatch(url) else UNSHOWN
    hidden = f"{found[0]}{UNSHOWN}"
    parts = _parts(url)
    if parts is None or not url.isprintable():
        return hidden
    login, at, hosts = parts.netloc.rpartition("@")
    if not _are_hosts(hosts) or (not at and (hosts.startswith(":") or hosts.endswith(":"))):
        return hidden
    if "@" in parts.query + parts.fragment or ("@" in parts.path and (":" in parts.path or not _is_file(parts))):
        return hidden
    if at:
        user, colon, password = login.partition(":")
        known = password if colon else parts.scheme in ("postgresql", "postgres") and "@" not in login
        login = f"{user}:***" if known and colon else user if known else "***"
    query = f"?{'&'.join(_masked(parts.query.split('&')))}" if parts.query else ""
    return f"{found[0]}{login}{at}{hosts}{parts.path}{query}{f'#{UNSHOWN}' if parts.fragment else ''}"


def split_url(url: str, form: str, *, named: str = "") -> SplitResult:
    """Split the URL of a server, if there is no doubt where its parts end.

    Args:
        url: The URL.
        form: What a right one looks like.
        named: What the message begins with.

    Raises:
        ConfigurationError: It can't be read; most often, because of a character in the password.
    """
    # What urlsplit takes out of the middle of a URL without a word, and what can't be sent to a server.
    if re.search("[\\x00-\\x1f\\x7f\ud800-\udfff]", url):
        raise ConfigurationError(f"{named}{mask_url(url)} can't be used: it holds control characters or is not UTF-8")
    parts = _parts(url)
    if parts is None or not _is_whole(parts):
        raise ConfigurationError(f"{named}{mask_url(url)} can't be used: {ENCODED}; it is {form}")
    return parts


def unknown_option(names: Collection[str], url: str) -> str:
    """Which option nobody knows, for a message; not by its name if that could be a piece of a password."""
    query = getattr(_parts(url), "query", "")
    for name in sorted(names):
        if name in _SECRET:
            return f"unknown option {name!r}"
        given = [pair.partition("=") for pair in query.split("&")]
        if not any(name == other for other, _, _ in given):  # a keyword
            return f"unknown option {name!r}"
        plain = re.fullmatch(r"[a-z_]{1,40}", name) and (name, "=") in [(n, sign) for n, sign, _ in given]
        if plain and "@" not in url.partition("?")[2] and not any("pass" in other.lower() for other, _, _ in given):
            return f"unknown option {name!r}"
    return "unknown option"


def _parts(url: str) -> SplitResult | None:
    try:
        return urlsplit(url)
    except ValueError:  # its text quotes what it could not read
        return None


def _are_hosts(hosts: str) -> bool:
    found = [_HOST.fullmatch(host) for host in hosts.split(",")]
    return all(host is not None and int(host[1] or 0) < 65_536 for host in found)


def _is_file(parts: SplitResult) -> bool:
    """Whether the path names a file on this machine, in which an @ is nothing special."""
    if parts.netloc:
        return False
    return parts.scheme == "sqlite" or (parts.scheme.endswith("+unix") and ":" not in parts.path)


def _is_whole(parts: SplitResult) -> bool:
    hosts = parts.netloc.rpartition("@")[2]
    if not _are_hosts(hosts) or parts.fragment or "@" in parts.query:
        return False
    return "@" not in parts.path or _is_file(parts)


def _masked(pairs: list[str]) -> list[str]:
    """The parts of a query that are known; of one with a password in it, which may hold an unescaped &, no others."""
    names = [pair.partition("=")[0] for pair in pairs]
    if secret := _SECRET.intersection(names):
        return [f"{name}=***" if name in secret else UNSHOWN for name in names]
    plain = [
        name in _PLAIN and _VALUE.fullmatch(pair.partition("=")[2]) for name, pair in zip(names, pairs, strict=True)
    ]
    return [pair if shown else UNSHOWN for pair, shown in zip(pairs, plain, strict=True)]
