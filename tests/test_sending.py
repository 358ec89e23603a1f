"""What exceptions of HTTP libraries and SDKs say of a request: sent and given up, or never sent."""

from __future__ import annotations

import anthropic
import httpx
import httpx2
import openai
import pytest

from respan_guard.sending import never_sent, timed_out

REQUEST = httpx2.Request("POST", "http://provider/v1/chat/completions")


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The error, raised from its cause."""
    try:
        raise error from cause
    except Exception as found:
        return found


def named(name: str, *bases: type[Exception]) -> Exception:
    """An exception of a library that is not here."""
    kind: type[Exception] = type(name, bases or (Exception,), {})
    return kind("x")


def named_after(error: object) -> str:
    """The id of a case."""
    return f"{type(error).__module__}-{type(error).__name__}"


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        httpx.ReadTimeout("x"),
        httpx2.ReadTimeout("x"),
        raised(openai.APITimeoutError(REQUEST), httpx2.ReadTimeout("x")),
        anthropic.APITimeoutError(REQUEST),
        named("ReadTimeout", type("Timeout", (OSError,), {})),  # requests
        named("SocketTimeoutError", TimeoutError),  # aiohttp
        named("ReadTimeoutError"),  # urllib3
        ExceptionGroup("tasks", [httpx.ReadTimeout("x")]),
        raised(RuntimeError("the app's own"), httpx.ReadTimeout("x")),
    ],
    ids=named_after,
)
def test_timeouts_of_what_was_sent(error: Exception) -> None:
    """Whoever raises it, and whatever an app makes of it: the provider may have the request."""
    assert timed_out(error)
    assert not never_sent(error)


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("x"),
        httpx.ConnectTimeout("x"),
        httpx2.PoolTimeout("x"),
        httpx.WriteTimeout("x"),
        raised(openai.APITimeoutError(REQUEST), httpx2.ConnectTimeout("x")),
        raised(httpx.ConnectError("x"), TimeoutError()),
        named("ConnectTimeout", type("Timeout", (OSError,), {})),
        named("ConnectionTimeoutError", TimeoutError),
        named("PoolTimeout"),
        named("TimeoutError"),  # a database's, say
        ExceptionGroup("tasks", [httpx.ReadTimeout("x"), ValueError()]),
    ],
    ids=named_after,
)
def test_what_is_no_timeout_of_what_was_sent(error: Exception | None) -> None:
    """Other errors, and timeouts before a connection was there."""
    assert not timed_out(error)
