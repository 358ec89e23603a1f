"""What a limit promises over any interleaving, whatever the traces look like."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from respan_guard.backends.base import Allowed, Release
from respan_guard.backends.memory import MemoryBackend
from respan_guard.testing.contract_support import DAY, NOW, admit, budget, rate, record, total


@given(
    amount=st.integers(0, 60),
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(0, 30)), max_size=60),
)
def test_upper_bound_holds_never_overspend(amount: int, steps: list[tuple[int, int, int]]) -> None:
    """With costs up to what is held, and records before releases, no period and no total ever passes its amount."""
    backend, running = MemoryBackend(), deque[tuple[str, int, int]]()
    spent = {DAY: 0, DAY + 1: 0}
    for number, (choice, hold, cost) in enumerate(steps):
        day = DAY + (number > len(steps) // 2)
        limits = budget(amount, first=day, end=day + 1), total(2 * amount)
        if choice < 3:
            op = admit(f"a{number}", *limits, day=day, cost=hold)
            if isinstance(backend.apply_now([op], NOW + number)[0], Allowed):
                running.append((op.id, hold, day))
        elif running:
            admission, held, booked = running.popleft() if choice == 3 else running.pop()
            spent[booked] += min(held, cost)
            entry = record(f"e{number}", min(held, cost), admission=admission, day=booked)
            backend.apply_now([entry, Release("ann", admission)], NOW + number)
    assert max(spent.values()) <= amount
    assert sum(spent.values()) <= 2 * amount


@given(amount=st.integers(1, 9), gaps=st.lists(st.integers(0, 130), min_size=1, max_size=120))
def test_a_rate_is_exact_from_idle_and_never_doubled(amount: int, gaps: list[int]) -> None:
    """From idle exactly N in the first window; at most 2 N in any stretch of its length."""
    backend, now, hits = MemoryBackend(), NOW, list[int]()
    limit = rate(amount, 100)
    for number, gap in enumerate([0, *gaps]):
        now += gap
        if isinstance(backend.apply_now([admit(f"a{number}", limit)], now)[0], Allowed):
            hits.append(now)
    asked_at = [NOW]
    for gap in gaps:
        asked_at.append(asked_at[-1] + gap)
    first = sum(at < NOW + 100 for at in hits)
    assert first == min(amount, sum(at < NOW + 100 for at in asked_at))
    assert all(sum(start <= at < start + 100 for at in hits) <= 2 * amount for start in hits)
