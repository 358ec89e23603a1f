"""What an exception says of a request to a provider: whether it was sent, and whether only patience ended.

HTTP libraries name these alike, so classes go by their names and none of the libraries is imported.
"""

from __future__ import annotations

__all__ = ["never_sent", "timed_out"]

_NEVER_SENT = frozenset(
    {"ConnectError", "ConnectTimeout", "LocalProtocolError", "PoolTimeout", "ProxyError", "UnsupportedProtocol"}
    | {"WriteError", "WriteTimeout"}  # a request that is not wholly written is none
    | {"ConnectTimeoutError", "ConnectionTimeoutError", "NewConnectionError"}  # of urllib3 and aiohttp
)
_TIMEOUTS = frozenset({"APITimeoutError", "ReadTimeoutError", "TimeoutException"})
_MAX_CAUSES = 8


def never_sent(error: BaseException) -> bool:
    """Whether an error says that the request did not leave, or not as a whole."""
    return not _NEVER_SENT.isdisjoint(_names(error))


def timed_out(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is a timeout of a request that may have been sent.

    The provider has such a request, works on, and bills. Also of a group of one error, as task groups raise it.
    """
    found = False
    for _ in range(_MAX_CAUSES):
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is None:
            break
        if never_sent(error):
            return False
        found = found or isinstance(error, TimeoutError) or any(_is_timeout(name) for name in _names(error))
        error = error.__cause__
    return found


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _is_timeout(name: str) -> bool:
    return name.endswith("Timeout") or name in _TIMEOUTS
