"""HTTP to where records go: addresses that are checked, no redirects, answers that can't hang or flood."""

from __future__ import annotations

import asyncio
import functools
import importlib
import ipaddress
import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final
from urllib.parse import urlsplit

from respan_guard.clock import Clock
from respan_guard.errors import ConfigurationError
from respan_guard.exporters.base import BatchRefused, ExportFailed

__all__ = ["Answer", "Sender", "check_answer", "is_public"]

_TIMEOUT: Final = 15.0
_MAX_ANSWER: Final = 1 << 20
_MAX_WAIT: Final = 86_400.0
_GIVEN_OUT: Final = ipaddress.ip_network("2000::/3")
_EXAMPLES: Final = ipaddress.ip_network("3fff::/20")
_REFUSED: Final = frozenset({400, 413, 422})


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Sender:
    """Posts to one URL.

    Args:
        url: Where to; http or https.
        allow_private: Whether it may lead to an address that is not public. If not, the name is resolved here, each
            address is looked at, and the connection goes to an address that was looked at: a name that means
            something else a moment later leads nowhere.

    Raises:
        ConfigurationError: It is no such URL, it has a password in it, its address is not public, or the library
            is missing.
    """

    def __init__(self, url: str, *, allow_private: bool) -> None:
        self.url = url
        self._allow_private = allow_private
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigurationError(f"the URL can't be read: {error}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigurationError("the URL must begin with https:// (or http://) and name a host")
        if parts.username is not None:
            raise ConfigurationError("the URL must not hold a user or a password")
        self._host = host
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._secure = parts.scheme == "https"
        self._http = _library()
        self._client: Any = None
        if not allow_private and _is_address(host) and not is_public(host):
            raise ConfigurationError(f"{host} is not a public address; allow_private=True sends there all the same")

    async def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send once.

        Raises:
            ExportFailed: No answer came, or the name leads to an address that is not public.
        """
        if self._client is None:
            self._client = self._connect()
        try:
            async with asyncio.timeout(_TIMEOUT):
                if self._allow_private:
                    return await self._send(self._client.build_request("POST", self.url), body, headers)
                return await self._send_checked(body, headers)
        except TimeoutError:
            raise ExportFailed(f"no answer within {_TIMEOUT:g} s") from None
        except self._http.HTTPError as error:
            raise ExportFailed(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _connect(self) -> Any:
        # The authorities that the environment names (SSL_CERT_FILE, SSL_CERT_DIR): who runs this may have one of their
        # own. But no proxy of it, which would resolve the name on its own. No redirects, and the jar takes no cookies.
        try:
            trusted = self._http.create_ssl_context(trust_env=True)
        except OSError as error:
            raise ExportFailed(f"what SSL_CERT_FILE or SSL_CERT_DIR names can't be used: {error}") from error
        jar = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        return self._http.AsyncClient(
            timeout=_TIMEOUT, trust_env=False, follow_redirects=False, verify=trusted, cookies=jar
        )

    async def close(self) -> None:
        """Let go of connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _send_checked(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        found = await self._resolve()
        addresses = [*found[:2], *found[2:][-1:]]  # the last is of the other family, where the host has both
        # One that swallows packets must leave time for the others.
        patience = self._http.Timeout(_TIMEOUT, connect=_TIMEOUT / (len(addresses) + 1))
        failure: Exception | None = None
        for address in addresses:
            request = self._client.build_request("POST", self.url, timeout=patience)
            named = request.headers["host"]
            request.url = request.url.copy_with(host=address)
            if self._secure:  # the certificate is held to the name, not to the address
                request.extensions["sni_hostname"] = self._host
            try:
                return await self._send(request, body, {**headers, "host": named})
            except (self._http.ConnectError, self._http.ConnectTimeout) as error:
                failure = error
        raise failure or ExportFailed(f"{self._host} has no address")

    async def _send(self, request: Any, body: bytes, headers: Mapping[str, str]) -> Answer:
        url, extensions = request.url, request.extensions
        # Not compressed: a small answer must not become a large one.
        fields = {"accept-encoding": "identity", "user-agent": "respan-guard", **headers}
        request = self._client.build_request("POST", url, content=body, headers=fields, extensions=extensions)
        answer = await self._client.send(request, stream=True)
        try:
            parts: list[bytes] = []
            size = 0
            async for chunk in answer.aiter_raw():
                size += len(chunk)
                if size > _MAX_ANSWER:
                    break
                parts.append(chunk)
            return Answer(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, b"".join(parts))
        finally:
            await answer.aclose()

    async def _resolve(self) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ExportFailed(f"{self._host} can't be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not is_public(address):
                raise ExportFailed(f"{self._host} leads to {address}, which is not a public address")
        return addresses


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, whatever it is wrapped in."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        # Of all the others only 2000::/3 was ever given out; not all Pythons know the newer exceptions.
        if ip not in _GIVEN_OUT or ip in _EXAMPLES:
            return False
    return ip.is_global and not ip.is_multicast


def check_answer(answer: Answer, clock: Clock) -> None:
    """Return if the batch was taken.

    2xx is taken. 400, 413 and 422 say that this batch is wrong or too large; everything else, redirects and wrong
    keys included, may be mended on the other side or in the settings, so nothing is given up for it.

    Raises:
        ExportFailed: Try again later.
        BatchRefused: Not as it is.
    """
    if 200 <= answer.status < 300:
        return
    if answer.status in _REFUSED:
        raise BatchRefused(f"HTTP {answer.status}")
    hint = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
    raise ExportFailed(f"HTTP {answer.status}{hint}", _retry_after(answer, clock))


def _retry_after(answer: Answer, clock: Clock) -> float | None:
    told: Any = answer.headers.get("retry-after")
    if told is None and answer.status == 429:
        try:
            told = json.loads(answer.body)["retry_after"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    try:
        seconds = float(told)
    except (TypeError, ValueError):
        try:
            when = parsedate_to_datetime(str(told))
        except ValueError:
            return None
        seconds = when.replace(tzinfo=when.tzinfo or UTC).timestamp() - clock.now_ms() / 1000
    return None if math.isnan(seconds) else min(max(seconds, 0.0), _MAX_WAIT)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


@functools.cache
def _library() -> Any:
    try:
        return importlib.import_module("httpx2")
    except ModuleNotFoundError:
        raise ConfigurationError("sending over HTTP needs httpx2: pip install 'respan-guard[exporters]'") from None
