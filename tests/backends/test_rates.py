"""Rates: the same sliding window as the `limits` package has, and waits that are exact to the millisecond."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

from hypothesis import assume, example, given
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from respan_guard.backends.base import Admit, Allowed, Limit, Refused
from respan_guard.backends.memory import MemoryBackend
from respan_guard.decision import rate_wait_ms

START = 4_000_000_000_000  # an edge of any window below; far off, so that nothing of it expires by the real clock
MONTH_MS = 31 * 86_400_000

asks = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3)), max_size=30)
"""A trace: how long after the one before, and for how many requests."""


class Customer:
    """One customer of a store in memory, who has a rate."""

    def __init__(self, amount: int, window_ms: int) -> None:
        self.backend = MemoryBackend()
        self.limits = (Limit("rate_limit", "rate", "requests", amount, window_ms),)
        self.asked = 0

    def ask(self, now: int, requests: int = 1) -> Allowed | Refused:
        """An admission under an id of its own, on a day that never ends."""
        self.asked += 1
        op = Admit(str(self.asked), "c", "", 1, 0, 1 << 52, self.limits, requests=requests)
        (answer,) = self.backend.apply_now([op], now)
        assert isinstance(answer, Allowed | Refused)
        return answer


@given(
    seconds=st.sampled_from([1, 2, 4]),
    amount=st.integers(1, 12),
    pauses=st.lists(st.sampled_from([0, 0, 125, 250, 500, 1000, 2000]), max_size=80),
)
@example(seconds=1, amount=10, pauses=[0] * 9 + [1000, 125, 125, 125, 125, 125])
def test_the_window_is_that_of_the_limits_package(seconds: int, amount: int, pauses: list[int]) -> None:
    """Over any trace that begins at a window's edge, a hit is let in iff the `limits` package lets it in."""
    # That package's windows begin at multiples of their length, ours with a customer's first hit, and anew after two
    # quiet windows: so a trace begins at an edge and ends there. It counts in floats: eighths of a second are exact.
    customer, width = Customer(amount, seconds * 1000), seconds * 1000
    theirs, item = SlidingWindowCounterRateLimiter(MemoryStorage()), RateLimitItemPerSecond(amount, seconds)
    now = last = START
    with mock.patch("limits.storage.memory.time", SimpleNamespace(time=lambda: now / 1000)):
        for pause in [0, *pauses]:
            now += pause
            if now // width > last // width + 1:
                break
            expected = theirs.hit(item, "c")
            assert isinstance(customer.ask(now), Allowed) == expected, f"{now - START} ms after the start"
            last = now if expected else last


@given(trace=asks, amount=st.integers(0, 20), width=st.sampled_from([1, 7, 1000, 60_000, MONTH_MS]), more=asks)
@example(trace=[(0, 3)] * 6, amount=18, width=1000, more=[(900, 1)])
def test_a_wait_is_exact(trace: list[tuple[int, int]], amount: int, width: int, more: list[tuple[int, int]]) -> None:
    """What is refused now is let in after the wait, and not 1 ms earlier, nor at any moment before."""
    customer, now = Customer(amount, width), START
    for pause, requests in [*trace, *[(pause * width // 1000, requests) for pause, requests in more]]:
        now += pause
        answer = customer.ask(now, requests)
        if isinstance(answer, Allowed):
            continue
        wait = rate_wait_ms(answer.windows[0], width, amount, requests, now)
        assert (wait is None) == (requests > amount)
        if wait is None:
            continue
        assert wait > 0
        for sooner in {now + wait // 2, now + wait - 1}:
            assert isinstance(customer.ask(sooner, requests), Refused)
        now += wait
        assert isinstance(customer.ask(now, requests), Allowed)


@given(trace=asks, amount=st.integers(1, 20), width=st.sampled_from([7, 1000, 60_000]))
def test_what_is_let_in_needs_no_wait(trace: list[tuple[int, int]], amount: int, width: int) -> None:
    """Before a request that is let in the wait is 0, by the same figures."""
    customer, now = Customer(amount, width), START
    for pause, requests in trace:
        now += pause
        answer = customer.ask(now, requests)
        wait = rate_wait_ms(answer.windows[0], width, amount, requests, now)
        assert (wait == 0) == isinstance(answer, Allowed)


@given(amount=st.integers(1, 40), width=st.sampled_from([1000, 60_000]), pauses=st.lists(st.integers(0, 400)))
@example(amount=2, width=1000, pauses=[333, 333, 333, 999, 0, 0, 2, 500])
def test_no_stretch_has_more_than_twice_the_amount(amount: int, width: int, pauses: list[int]) -> None:
    """Whoever hammers: from idle exactly N pass in the first window, and 2 N at most in any stretch of its length."""
    customer, now = Customer(amount, width), START
    passed: list[int] = []
    for pause in [*[0] * (amount + 1), *pauses]:
        now += pause * width // 1000
        if isinstance(customer.ask(now), Allowed):
            passed.append(now)
    assert sum(at < START + width for at in passed) == amount
    for end in passed:
        assert sum(end - width < at <= end for at in passed) <= 2 * amount


@given(before=st.integers(1, 10), after=st.integers(1, 10), width=st.sampled_from([1000, 60_000]))
def test_another_amount_keeps_the_window(before: int, after: int, width: int) -> None:
    """Hits are counted per length of the window: a lower amount counts those that a higher one let in."""
    assume(before != after)
    customer = Customer(before, width)
    for _ in range(before):
        assert isinstance(customer.ask(START), Allowed)
    customer.limits = (Limit("rate_limit", "rate", "requests", after, width),)
    for number in range(before, after):
        assert isinstance(customer.ask(START), Allowed), number
    assert isinstance(customer.ask(START), Refused)
