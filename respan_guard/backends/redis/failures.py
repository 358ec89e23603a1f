"""What can go wrong with a Redis, and what each error of redis-py means."""

from __future__ import annotations

import asyncio
import re

from redis import exceptions as errors

from respan_guard.errors import (
    BackendError,
    ConfigurationError,
    CounterOverflow,
    GuardError,
    InvalidInput,
    StorageCorrupt,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
    StoreReset,
)

__all__ = ["FAILURES", "translated"]

_FORBIDDEN = re.compile("The user executing the script can't|ACL failure in script")
FAILURES = (errors.RedisError, errors.RedisClusterException, OSError, asyncio.TimeoutError)
"""What redis-py raises."""


def translated(error: BaseException, url: str, *, opening: bool) -> GuardError:
    """The library's error for one of redis-py. What only a person can mend is a `ConfigurationError` at start."""
    text = str(error)
    refusal: type[GuardError] = ConfigurationError if opening else StorageUnavailable
    if isinstance(error, errors.DataError):  # of the client, before anything is sent
        return InvalidInput(f"Redis can't store this: {text}")
    if isinstance(error, errors.BusyLoadingError):
        return StorageUnavailable(f"{url} is loading its data from disk and answers when that is done")
    if isinstance(error, (errors.AuthenticationError, errors.AuthorizationError)) or text.startswith("NOAUTH"):
        return refusal(f"{url} refuses the login ({text}); write redis://USER:PASSWORD@HOST")
    if isinstance(error, errors.NoPermissionError) or _FORBIDDEN.search(text):
        return refusal(f"{url} does not let this user do what the library needs: {text}")
    if isinstance(error, errors.ReadOnlyError):
        return StorageReadOnly(f"{url} is a read-only replica; name the primary")
    if isinstance(error, errors.OutOfMemoryError):
        return StorageFull(f"{url} has used up its maxmemory")
    if isinstance(error, (errors.ClusterError, errors.TryAgainError)):
        return StorageUnavailable(f"a part of {url} is on the move or down: {text}")
    if isinstance(error, errors.MovedError) or text.startswith(("MOVED", "ASK", "CROSSSLOT")):
        return refusal(f"{url} is a node of a Redis Cluster; write redis+cluster:// instead of redis://")
    if isinstance(error, errors.ResponseError):
        return _of_reply(text, url, refusal)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("verify failed: ")[2].partition(" (_ssl")[0] or text
        return refusal(f"the certificate of {url} can't be trusted ({reason}); ?ssl_ca_certs=FILE names its authority")
    if "CERTIFICATE_REQUIRED" in text or "certificate required" in text:
        return refusal(f"{url} wants a certificate of ours: ?ssl_certfile=FILE&ssl_keyfile=FILE")
    if isinstance(error, (errors.TimeoutError, asyncio.TimeoutError)):
        return StorageUnavailable(f"{url} gave no answer in time ({text or 'timeout'})")
    return StorageUnavailable(f"{url} can't be reached: {text or type(error).__name__}")


def _of_reply(text: str, url: str, refusal: type[GuardError]) -> GuardError:
    code, _, rest = text.partition(" ")
    if code == "RESET":
        return StoreReset(
            f"the store on {url} is not the one that was opened: it was wiped or replaced; restart to begin a new one"
        )
    if code == "OVERFLOW":
        return CounterOverflow(f"what customer {rest!r} used would pass 9,000,000 USD, or 9.0e15 tokens")
    if code in ("MISCONF", "NOREPLICAS"):
        return StorageReadOnly(f"{url} takes no writes: {text}")
    if code in ("CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "BUSY", "UNBLOCKED"):
        return StorageUnavailable(f"{url} can't answer now: {text}")
    if "DB index" in text or "unknown command" in text:
        return refusal(f"{url} can't be used: {text}")
    if code == "WRONGTYPE" or "script" in text:
        return StorageCorrupt(f"what is stored on {url} can't be read ({text}); see `respan-guard verify`")
    return BackendError(f"{url} answered {text}")
