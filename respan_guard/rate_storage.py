"""Rates in a storage of `limits` (https://limits.readthedocs.io), for people who keep them apart from the money.

A decision then takes two steps, rate first, budget second, and is no longer one atomic question: what a rate has
counted stays counted if the budget refuses afterwards, because `limits` can't take a hit back. That is on the strict
side, and keeps whoever is out of money from asking without end.
"""

from __future__ import annotations

from typing import Any, Final, cast

from limits.aio.storage import MovingWindowSupport, SlidingWindowCounterSupport
from limits.errors import ConfigurationError as LimitsConfigurationError
from limits.storage import MovingWindowSupport as BlockingMovingWindowSupport
from limits.storage import SlidingWindowCounterSupport as BlockingSlidingWindowCounterSupport
from limits.storage import StorageTypes, storage_from_string

from respan_guard.errors import ConfigurationError
from respan_guard.home_rates import HomeRates
from respan_guard.settings import Settings
from respan_guard.urls import ENCODED, mask_url, split_url

__all__ = ["RateStorage", "rate_storage"]

_REDIS: Final = ("redis", "rediss", "redis+unix", "redis+cluster", "redis+sentinel")
_PACKAGES: Final = {  # not the extras of `limits`: they pin clients to versions that are too old
    "redis": "'respan-guard[redis]'",
    "memcached": "'respan-guard[memcached]'",
    "mongodb": "motor",
}
_KNOWN: Final = "the storage URLs of limits, like redis://host:6379, memcached://host:11211 or memory://"
_MISSING: Final = ("could not be found", "prerequisite not available")  # what limits says of a package
_WINDOW_SUPPORT: Final = {
    "sliding-window-counter": (SlidingWindowCounterSupport, BlockingSlidingWindowCounterSupport),
    "moving-window": (MovingWindowSupport, BlockingMovingWindowSupport),
}


class RateStorage:
    """One guard's rates. Each home opens a storage of its own, as connections belong to loops.

    Args:
        url: A storage URL of `limits`, with or without "async+".
        strategy: "sliding-window-counter", "moving-window" or "fixed-window".
        namespace: Keeps several guards apart.

    Raises:
        ConfigurationError: The URL is none of `limits`, a package is missing, or the storage can't do the strategy.
    """

    def __init__(self, url: str, strategy: str, namespace: str) -> None:
        scheme, _, rest = url.removeprefix("async+").partition("://")
        # Valkey speaks Redis' protocol, so that one client serves both.
        scheme = {"valkey": "redis", "valkeys": "rediss", "valkey+unix": "redis+unix"}.get(scheme, scheme)
        self.scheme = scheme
        self.strategy = strategy
        self.namespace = namespace
        self._url = f"{'' if scheme == 'memory' else 'async+'}{scheme}://{rest}"
        self.shown = mask_url(url)
        split_url(url.removeprefix("async+"), _KNOWN, named="rate_limit_storage ")
        self.memory: StorageTypes | None = None
        storage = self.make(1.0)
        wanted = _WINDOW_SUPPORT.get(strategy)
        if wanted is not None and not isinstance(storage, wanted):
            raise ConfigurationError(f'rate_limit_storage {self.shown} can\'t do rate_limit_strategy "{strategy}"')
        if scheme == "memory":
            self.memory = storage  # one for all loops of the process

    def make(self, timeout: float) -> StorageTypes:
        """A storage whose calls give up after `timeout` seconds and are never tried again below us."""
        options: dict[str, Any] = {}
        kind = next((kind for kind in _PACKAGES if self.scheme.startswith(kind)), "")
        try:
            if self.scheme in _REDIS:
                from redis.asyncio.retry import Retry
                from redis.backoff import NoBackoff

                options = {
                    "implementation": "redispy",
                    "socket_timeout": timeout,
                    "socket_connect_timeout": timeout,
                    "retry": Retry(NoBackoff(), 0),
                }
            elif self.scheme == "memcached":
                options = {"connect_timeout": timeout, "read_timeout": timeout, "blocking_timeout": timeout}
            storage = storage_from_string(self._url, **options)
            if self.scheme in _REDIS and self.scheme != "redis+cluster":  # a cluster's nodes say where to ask instead
                from respan_guard.backends.redis.demoted import renewing

                renewing(cast(Any, storage).bridge.storage)
            return storage
        except (ImportError, LimitsConfigurationError) as error:
            missing = isinstance(error, ImportError) or any(words in str(error) for words in _MISSING)
            why = f"can't be used; known are {_KNOWN}"
            if kind and missing:
                why = f"needs a package that is missing; pip install {_PACKAGES[kind]}"
        except Exception as error:  # of a client that can't read its URL
            why = f"can't be used ({type(error).__name__}): {ENCODED}; known are {_KNOWN}"
        # Their texts may hold the URL with the password, so that none of them goes on, not even as the cause.
        raise ConfigurationError(f"rate_limit_storage {self.shown} {why}")

    def open(self, timeout: float) -> HomeRates:
        """What the home on the running loop counts with."""
        return HomeRates(self, timeout)


def rate_storage(settings: Settings) -> RateStorage | None:
    """Where rates are kept that the store shall not keep; None if it shall.

    Raises:
        ConfigurationError: As `RateStorage`, or a strategy is chosen for the store, which has its own.
    """
    url, strategy = settings.rate_limit_storage, settings.rate_limit_strategy
    if url is not None:
        return RateStorage(url, strategy, settings.namespace)
    if strategy != "sliding-window-counter":
        raise ConfigurationError(
            f'rate_limit_strategy "{strategy}" needs rate_limit_storage: the store itself counts in sliding windows'
        )
    return None
