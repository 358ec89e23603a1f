"""The rates of one home, kept in a storage of `limits`: asked in turns, with a deadline and a breaker."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from limits import RateLimitItemPerSecond
from limits.aio.storage import SlidingWindowCounterSupport
from limits.aio.strategies import STRATEGIES
from limits.strategies import STRATEGIES as BLOCKING_STRATEGIES

from respan_guard.breaker import Breaker, Notices
from respan_guard.clock import SystemClock
from respan_guard.errors import ConfigurationError, StorageUnavailable

if TYPE_CHECKING:
    from respan_guard.backends.base import Limit
    from respan_guard.rate_storage import RateStorage

__all__ = ["Counted", "HomeRates"]

logger = logging.getLogger("respan_guard")
T = TypeVar("T")
_FOR_GOOD: Final = {"AuthenticationError", "AuthorizationError", "NoPermissionError"}  # of redis
_AT_ONCE = 20
"""The most that ask at the same time: `limits` opens a connection for each, and a pool that is full is an error."""
_AMPLE = 1_000_000  # probes a second
_clock = SystemClock()  # the time of `limits`, which knows no other


@dataclass(frozen=True, slots=True)
class Counted:
    """What a rate answered.

    Attributes:
        allowed: Whether the requests fit, and were counted.
        used: What is counted in the window, with these requests if they were allowed.
        wait_ms: Milliseconds until as many requests fit, if they don't now.
        reset_ms: Milliseconds until the window, or the oldest hit in it, ends.
    """

    allowed: bool
    used: int
    wait_ms: int
    reset_ms: int


class _Item(RateLimitItemPerSecond):
    """A rate whose key has no amount, so that changing 100 to 50 keeps what was counted."""

    def key_for(self, *identifiers: bytes | str | int | float) -> str:
        return "/".join([self.namespace, *map(str, identifiers), str(self.multiples)])


class HomeRates:
    """The rates of one home. Its methods run on that home's loop."""

    def __init__(self, config: RateStorage, timeout: float) -> None:
        self._config = config
        self._timeout = timeout
        self._storage = config.memory or config.make(timeout)
        # In memory, the blocking twin of limits: any thread may use it, and it never waits.
        kinds: Mapping[str, Any] = STRATEGIES if config.memory is None else BLOCKING_STRATEGIES
        self._limiter = kinds[config.strategy](self._storage)
        self._tasks: set[asyncio.Future[Any]] = set()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._probe_at = 0.0
        self.breaker = Breaker()
        self._notices = Notices("the storage of rates")

    async def count(self, customer: str, rates: Sequence[Limit], requests: int) -> list[Counted]:
        """Count requests against rates, in their order, until one refuses. What came before it stays counted.

        Raises:
            StorageUnavailable: No answer in time; whether they were counted is unknown.
        """
        found = await self._ask(self._count_all(customer, rates, requests))
        if any(answer.allowed for answer in found):
            self._worked()  # a refusal may only have been read: what takes no writes says it, too
        return found

    async def look(self, customer: str, rates: Sequence[Limit]) -> list[Counted]:
        """Where the rates stand; counts nothing.

        Raises:
            StorageUnavailable: No answer in time.
        """

        async def all_of_them() -> list[Counted]:
            return [await self._look(rate, self._item(rate), _key(customer), 1, allowed=True) for rate in rates]

        return await self._ask(all_of_them())

    async def check(self) -> None:
        """Whether the storage answers.

        Raises:
            StorageUnavailable: It does not.
        """
        await self._ask(self._check())

    async def verify(self) -> None:
        """Ask once, at start. An outage is only logged: what it means is decided for each request.

        Raises:
            ConfigurationError: The storage answers, and that it won't serve us: a wrong password or database.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await _settled(self._storage.get("respan-guard/start"))
        except Exception as error:
            said = str(error) or "no answer in time"
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if kinds & _FOR_GOOD or "DB index" in said:
                raise ConfigurationError(f"rate_limit_storage {self._config.shown} refuses to serve: {said}") from error
            logger.warning("the storage of rates is unavailable, the guard starts without it: %s", said)

    async def _check(self) -> None:
        if not await _settled(self._storage.check()):
            raise StorageUnavailable(f"{self._config.shown} does not answer")

    async def _count_all(self, customer: str, rates: Sequence[Limit], requests: int) -> list[Counted]:
        found = []
        for rate in rates:
            found.append(await self._count(rate, _key(customer), requests))
            if not found[-1].allowed:
                break
        return found

    async def _count(self, rate: Limit, key: str, requests: int) -> Counted:
        if requests > rate.amount:
            return Counted(False, rate.amount, rate.window_ms, rate.window_ms)  # never: nothing is asked
        item = self._item(rate)
        allowed = await _settled(self._limiter.hit(item, key, cost=requests))
        return await self._look(rate, item, key, requests, allowed=allowed)

    def _item(self, rate: Limit) -> _Item:
        return _Item(rate.amount, rate.window_ms // 1000, f"respan-guard/{self._config.namespace}")

    async def _look(self, rate: Limit, item: _Item, key: str, requests: int, *, allowed: bool) -> Counted:
        width = rate.window_ms
        if self._config.strategy == "sliding-window-counter":
            storage = cast(SlidingWindowCounterSupport, self._storage)
            state = await _settled(storage.get_sliding_window(item.key_for(key), item.get_expiry()))
            before, before_s, hits, hits_s = state
            left = round(before_s * 1000) if before else round(hits_s * 1000) % width or width
            used = int(before * min(left, width) / width) + hits
            room = rate.amount - requests - hits
            if room >= 0:
                wait = left - room * width // before if before else 0
            else:
                wait = left + width - (rate.amount - requests) * width // hits
            return Counted(allowed, used, max(0, wait), left)
        stats = await _settled(self._limiter.get_window_stats(item, key))
        left = max(0, round(stats.reset_time * 1000) - _clock.now_ms())
        return Counted(allowed, rate.amount - max(0, stats.remaining), left, left)

    async def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            # To wait for one's turn is no fault of the storage's: its time begins afterwards.
            self._check_breaker()
            await self._turns.acquire()
            try:
                self._check_breaker()
            except StorageUnavailable:
                self._turns.release()
                raise
        except BaseException:
            work.close()
            raise
        # Shielded: cancelling a client in the middle of a reply is left to its own timeout.
        task = self._keep(work)
        task.add_done_callback(lambda _: self._turns.release())
        try:
            async with asyncio.timeout(self._timeout):
                found = await asyncio.shield(task)
        except StorageUnavailable as error:
            self._failed(str(error))
            raise
        except TimeoutError:
            self._failed("no answer in time")
            raise StorageUnavailable(f"the storage of rates gave no answer within {self._timeout:g} s") from None
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            self._failed(said)
            raise StorageUnavailable(f"the storage of rates failed: {said}") from error
        return found

    def _check_breaker(self) -> None:
        if self.breaker.is_open:
            self._probe_soon()
            raise StorageUnavailable(f"the storage of rates is down: {self.breaker.cause}")

    def _failed(self, cause: str) -> None:
        self._notices.failed(cause, _clock.monotonic())
        self.breaker.failed(cause)
        self._probe_at = asyncio.get_running_loop().time() + self.breaker.pause

    def _worked(self) -> None:
        self.breaker.worked()
        self._notices.worked()

    def _probe_soon(self) -> None:
        """Find out in the background whether it is back and counts; no request waits for that."""
        now = asyncio.get_running_loop().time()
        if now >= self._probe_at:
            self._probe_at = now + self._timeout + self.breaker.pause
            self._keep(self._probe())

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.shield(self._keep(self._hit()))
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}" if str(error) else "no answer in time")
        else:
            self._worked()

    async def _hit(self) -> None:
        """Count what is nobody's, for a second: a full or read-only storage answers whatever only reads."""
        item = _Item(_AMPLE, 1, f"respan-guard/{self._config.namespace}")
        await _settled(self._limiter.hit(item, "probe"))

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited may be gone

    async def close(self) -> None:
        """Let go of connections."""
        for task in list(self._tasks):
            task.cancel()
        bridge = getattr(self._storage, "bridge", None)
        for owner, name in ((bridge, "storage"), (bridge, "_storage")):
            await _closed(getattr(owner, name, None))
        await asyncio.sleep(0)  # transports close with the loop's next pass


async def _settled(answer: Any) -> Any:
    """The answer of a storage, whether it makes one wait or not."""
    return await answer if inspect.isawaitable(answer) else answer


async def _closed(client: Any) -> None:
    """Close a client of whichever package: redis' `aclose`, else the pool's `close`."""
    close = getattr(client, "aclose", None) or getattr(getattr(client, "connection_pool", None), "close", None)
    if close is None:
        return
    try:
        done = close()
        if inspect.isawaitable(done):
            await asyncio.wait_for(done, 1.0)
    except Exception as error:
        logger.debug("closing the storage of rates: %r", error)


def _key(customer: str) -> str:
    """A customer as part of a key: of one length, and no id reaches another's."""
    return blake2b(customer.encode(), digest_size=16).hexdigest()
