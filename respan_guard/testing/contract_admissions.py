"""Rules of admissions, holds, releases and renewals."""

from __future__ import annotations

from typing import Any

import pytest

from respan_guard.backends.base import REPLAY_MS, Admit, Allowed, Backend, Ended, Put, Refused, Release, Renew, Stale
from respan_guard.testing.contract_support import (
    DAY,
    DAY_MS,
    MAX,
    NOW,
    BackendFixture,
    admit,
    allowed,
    budget,
    dump,
    one,
    rate,
    record,
    recorded,
    refused,
    total,
)

__all__ = ["AdmissionRules"]

BOUNDARIES = [0, 1, 10**14, MAX - 1, MAX]


class AdmissionRules(BackendFixture):
    """Who is let in, and what that holds."""

    async def test_a_rate_admits_exactly_its_amount(self, backend: Backend) -> None:
        """From idle, N fit into the first window; the next is refused for the rate and not counted."""
        for number in range(5):
            assert (await allowed(backend, admit(f"a{number}", rate(5)), NOW + number)).used == (number,)
        answer = await refused(backend, admit("a5", rate(5)), NOW + 59_999)
        assert answer == Refused(NOW + 59_999, ("rate",), (5,), (0,), ((NOW, 0, 5),))

    async def test_a_rate_slides(self, backend: Backend) -> None:
        """What the window before counted fades out evenly, rounded down."""
        for number in range(4):
            await allowed(backend, admit(f"a{number}", rate(4)), NOW)
        for after, used in ((60_000, 4), (60_001, 3), (75_000, 3), (75_001, 2), (105_000, 1), (119_999, 0)):
            at = await backend.standing("ann", [rate(4)], now=NOW + after)
            assert (at.used, at.windows) == ((used,), ((NOW + 60_000, 4, 0),))

    async def test_a_rate_begins_anew_after_two_quiet_windows(self, backend: Backend) -> None:
        """The next hit is then the start of a window."""
        await allowed(backend, admit("a", rate(1)), NOW)
        answer = await allowed(backend, admit("b", rate(1)), NOW + 120_000)
        assert answer.windows == ((NOW + 120_000, 0, 0),)

    async def test_rates_of_one_length_share_a_counter(self, backend: Backend) -> None:
        """Each request counts once, and another amount keeps what was counted."""
        await allowed(backend, admit("a", rate(5), rate(9)))
        assert (await allowed(backend, admit("b", rate(2)))).used == (1,)
        assert (await refused(backend, admit("c", rate(2)))).used == (2,)

    @pytest.mark.parametrize("limit", [rate(0), budget(0), total(0), budget(0, "tokens"), total(0, "requests")])
    async def test_an_amount_of_0_refuses_everything(self, backend: Backend, limit: object) -> None:
        """Even who asks for nothing but to be let in."""
        assert isinstance(limit, type(rate(0)))
        reason = "rate" if limit.kind == "rate" else "exhausted"
        assert (await refused(backend, admit("a", limit))).reasons == (reason,)

    @pytest.mark.parametrize("metric", ["cost", "tokens"])
    async def test_holds_fill_a_budget_exactly(self, backend: Backend, metric: str) -> None:
        """What fits exactly is let in; what others hold refuses as "held", not as spent."""

        def ask(admission: str, amount: int) -> Admit:
            given: dict[str, Any] = {metric: amount}
            return admit(admission, total(10, metric), **given)

        await allowed(backend, ask("a", 4))
        answer = await allowed(backend, ask("b", 6))
        assert (answer.used, answer.held) == ((0,), (4,))
        answer_no = await refused(backend, ask("c", 1))
        assert (answer_no.reasons, answer_no.used, answer_no.held) == (("held",), (0,), (10,))

    async def test_what_can_never_fit_is_exhausted(self, backend: Backend) -> None:
        """More than what is left without others' holds is no transient refusal; a hold is never shrunk to fit."""
        await recorded(backend, record("e", 6))
        assert (await refused(backend, admit("a", total(10), cost=5))).reasons == ("exhausted",)
        await allowed(backend, admit("b", total(10), cost=4))

    async def test_a_used_up_budget_refuses_who_holds_nothing(self, backend: Backend) -> None:
        """Unless what is asked for is free: that passes whatever was spent, but not for what it holds."""
        await recorded(backend, record("e", 10))
        assert (await refused(backend, admit("a", total(10)))).reasons == ("exhausted",)
        await allowed(backend, admit("b", total(10), free=True))
        await allowed(backend, admit("c", total(9), free=True))
        assert (await refused(backend, admit("d", total(10), free=True, cost=1))).reasons == ("exhausted",)

    async def test_all_limits_are_answered_together(self, backend: Backend) -> None:
        """Every limit's numbers are there, in order, and every refusing one has its reason."""
        await recorded(backend, record("e", 10, input_tokens=3))
        answer = await refused(backend, admit("a", rate(0), budget(100), total(10), total(50, "tokens"), cost=1))
        assert answer.reasons == ("rate", None, "exhausted", None)
        assert (answer.used, answer.held) == ((0, 10, 10, 3), (0, 0, 0, 0))

    async def test_a_refusal_changes_nothing(self, backend: Backend) -> None:
        """No customer, no window, no hold, no row; of a customer that is known as of one that is not."""
        await allowed(backend, admit("a", rate(9), total(10), cost=10))
        before = await dump(backend, NOW + 70_000, rate(9), total(10))
        for number in range(20):
            for customer in ("ann", "bob"):
                op = admit(f"b{number}", rate(9), total(10), customer=customer, cost=11)
                assert isinstance(await one(backend, op, NOW + 70_000), Refused)
        assert await dump(backend, NOW + 70_000, rate(9), total(10)) == before
        assert await backend.get("bob") is None

    async def test_a_refusal_is_not_remembered(self, backend: Backend) -> None:
        """The same id is judged anew."""
        await refused(backend, admit("a", total(0)))
        await allowed(backend, admit("a", total(5), cost=5))

    async def test_an_old_revision_is_stale(self, backend: Backend) -> None:
        """The answer brings the params and the store's time, and nothing changes."""
        put = await backend.put("ann", {"total_budget": "5"}, now=NOW)
        assert isinstance(put, Put)
        before = await dump(backend)
        assert await one(backend, admit("a")) == Stale(NOW, put.revision, {"total_budget": "5"})
        assert await one(backend, admit("a", customer="bob", revision="x")) == Stale(NOW, "", None)
        assert await dump(backend) == before
        await allowed(backend, admit("a", revision=put.revision))

    async def test_another_day_is_stale(self, backend: Backend) -> None:
        """A day is half-open: its first millisecond belongs to it, its last does not."""
        for start, end in ((NOW + 1, NOW + 2), (NOW - 1, NOW)):
            answer = await one(backend, admit("a", day_from_ms=start, day_to_ms=end))
            assert answer == Stale(NOW, "", None)
        await allowed(backend, admit("a", day_from_ms=NOW, day_to_ms=NOW + 1))

    async def test_an_admission_is_repeated_without_effect(self, backend: Backend) -> None:
        """A known id gets its first answer, whatever else was sent or stored meanwhile."""
        op = admit("a", rate(1), total(5), cost=5)
        first = await allowed(backend, op)
        await backend.put("ann", {"blocked": True}, now=NOW)
        before = await dump(backend)
        for again in (op, admit("a", total(0)), admit("a", revision="other")):
            assert await one(backend, again) == first
        assert await dump(backend) == before

    async def test_an_ended_admission_is_repeated_for_a_minute(self, backend: Backend) -> None:
        """Up to that, the first answer; from then on the id is new."""
        first = await allowed(backend, admit("a", rate(9)))
        await one(backend, Release("ann", "a"), NOW + 1000)
        for _ in range(3):
            assert await one(backend, admit("a", rate(9)), NOW + 1000 + REPLAY_MS - 1) == first
        later = await allowed(backend, admit("a", rate(9)), NOW + 1000 + REPLAY_MS)
        assert later != first
        assert len(await backend.holds("ann", now=NOW + 1000 + REPLAY_MS)) == 1

    async def test_an_expired_admission_is_repeated_for_a_minute(self, backend: Backend) -> None:
        """Counted from its expiry."""
        first = await allowed(backend, admit("a", ttl_ms=5000))
        assert await one(backend, admit("a"), NOW + 5000 + REPLAY_MS - 1) == first
        assert await one(backend, admit("a"), NOW + 5000 + REPLAY_MS) == Allowed(NOW + 5000 + REPLAY_MS)

    async def test_an_id_that_is_used_again_holds_once(self, backend: Backend) -> None:
        """The first use's expiry takes nothing from the second, nor from its neighbours."""
        limit = total(100)
        await allowed(backend, admit("a", limit, cost=10))
        await one(backend, Release("ann", "a"), NOW + 1)
        later = NOW + 1 + REPLAY_MS
        await allowed(backend, admit("b", limit, cost=20, ttl_ms=5_000_000), later)
        await allowed(backend, admit("a", limit, cost=10), later)
        for at, held in ((NOW + 600_000, 30), (later + 599_999, 30), (later + 600_000, 20), (later + 700_000, 20)):
            assert (await backend.standing("ann", [limit], now=at)).held == (held,)
            await one(backend, admit(f"c{at}", customer="bob"), at)

    async def test_holds_expire_without_a_sweeper(self, backend: Backend) -> None:
        """At its expiry a hold counts no more, although nothing ran; it is listed with what it never spent."""
        for number in range(10):
            await allowed(backend, admit(f"a{number}", total(10), cost=1, ttl_ms=1000))
        await refused(backend, admit("b", total(10), cost=1), NOW + 999)
        await allowed(backend, admit("b", total(10), cost=10), NOW + 1000)
        expired = await backend.holds("ann", state="expired", now=NOW + 1000)
        assert [(row.id, row.cost, row.expires_ms) for row in expired] == [(f"a{n}", 1, NOW + 1000) for n in range(10)]
        assert [row.id for row in await backend.holds(now=NOW + 1000)] == ["b"]

    async def test_release_ends_a_hold_once(self, backend: Backend) -> None:
        """Released, then gone; of nobody: gone. Sums stay."""
        await allowed(backend, admit("a", total(5), total(9, "requests"), cost=5))
        assert await one(backend, Release("ann", "a")) == Ended("released")
        before = await dump(backend)
        for customer, admission in (("ann", "a"), ("ann", "other"), ("bob", "a")):
            assert await one(backend, Release(customer, admission)) == Ended("gone")
        assert await dump(backend) == before
        assert (await backend.standing("ann", [total(5), total(9, "requests")], now=NOW)).used == (0, 1)
        assert await backend.get("bob") is None

    async def test_release_of_an_expired_hold_says_so(self, backend: Backend) -> None:
        """Expired, then gone; what it never spent stays visible."""
        await allowed(backend, admit("a", cost=5, ttl_ms=1000))
        assert await one(backend, Release("ann", "a"), NOW + 1000) == Ended("expired")
        assert await one(backend, Release("ann", "a"), NOW + 1000) == Ended("gone")
        assert [row.cost for row in await backend.holds(state="expired", now=NOW + 1000)] == [5]

    async def test_renewal_lengthens_a_live_hold(self, backend: Backend) -> None:
        """Never shortens one, never revives one."""
        await allowed(backend, admit("a", total(5), cost=5, ttl_ms=10_000))
        assert await one(backend, Renew("ann", "a", 1000)) == Ended("renewed")
        assert await one(backend, Renew("ann", "a", 10_000), NOW + 9_999) == Ended("renewed")
        await refused(backend, admit("b", total(5), cost=1), NOW + 19_998)
        assert await one(backend, Renew("ann", "a", 10_000), NOW + 19_999) == Ended("gone")
        assert await one(backend, Renew("ann", "other", 10_000), NOW + 19_999) == Ended("gone")
        await allowed(backend, admit("b", total(5), cost=5), NOW + 19_999)
        assert await one(backend, Release("ann", "b"), NOW + 19_999) == Ended("released")
        assert await one(backend, Renew("ann", "b", 10_000), NOW + 19_999) == Ended("gone")

    async def test_holds_and_sums_count_on_their_days(self, backend: Backend) -> None:
        """A period is a run of days; a new one begins empty, and a hold belongs to the day that it was taken on."""
        today, tomorrow = budget(10, end=DAY + 1), budget(10, first=DAY + 1, end=DAY + 2)
        await allowed(backend, admit("a", today, cost=4))
        await recorded(backend, record("e", 6))
        answer = await allowed(backend, admit("b", today, tomorrow, free=True))
        assert (answer.used, answer.held) == ((6, 0), (4, 0))
        await allowed(backend, admit("c", tomorrow, day=DAY + 1, cost=10), NOW + DAY_MS // 2)

    async def test_a_changed_budget_keeps_what_was_spent(self, backend: Backend) -> None:
        """Another amount, another run of days: what is used is the sum of the days, live holds stay."""
        await allowed(backend, admit("a", budget(100), cost=5))
        await recorded(backend, record("e1", 10, day=DAY - 3))
        await recorded(backend, record("e2", 20))
        wanted = [budget(9), budget(50, first=DAY - 3), budget(50, end=DAY + 1), total(99)]
        at = await backend.standing("ann", wanted, now=NOW)
        assert (at.used, at.held) == ((20, 30, 20, 30), (5, 5, 5, 5))
        assert (await refused(backend, admit("b", budget(9)))).reasons == ("exhausted",)

    async def test_scopes(self, backend: Backend) -> None:
        """A limit counts its customer, its customer and model, its model, or all."""
        limits = [total(99, scope=scope) for scope in ("customer", "customer+model", "model", "all")]
        for number, (customer, model) in enumerate([("ann", "m"), ("ann", "n"), ("bob", "m"), ("bob", "n")]):
            await recorded(backend, record(f"e{number}", 10**number, customer=customer, model=model))
            await allowed(backend, admit(f"a{number}", customer=customer, model=model, cost=2 * 10**number))
        at = await backend.standing("ann", limits, "m", now=NOW)
        assert (at.used, at.held) == ((11, 1, 101, 1111), (22, 2, 202, 2222))
        await recorded(backend, record("f", 5, customer="bob", model="m", admission="a2"))
        await one(backend, Release("bob", "a2"))
        at = await backend.standing("ann", limits, "m", now=NOW)
        assert (at.used, at.held) == ((11, 1, 106, 1116), (22, 2, 2, 2022))
        at = await backend.standing("ann", limits, "m", now=NOW + 600_000)
        assert at.held == (0, 0, 0, 0)

    async def test_requests_may_count_more_or_nothing(self, backend: Backend) -> None:
        """An admission counts as many requests as it says."""
        limits = [rate(9), total(9, "requests")]
        await allowed(backend, admit("a", *limits, requests=3))
        await allowed(backend, admit("b", *limits, requests=0, cost=1))
        assert (await backend.standing("ann", limits, now=NOW)).used == (3, 3)
        assert (await refused(backend, admit("c", *limits, requests=7))).reasons == ("rate", "exhausted")
        await allowed(backend, admit("d", *limits, requests=6))
        await allowed(backend, admit("e", *limits, requests=0))

    async def test_a_batch_is_applied_in_order(self, backend: Backend) -> None:
        """Each operation sees those before it, and one that is refused does not stop the others."""
        limit = total(10)
        outcomes = await backend.apply(
            [
                admit("a", limit, cost=10),
                admit("b", limit, cost=1),
                record("e", 4, admission="a"),
                Release("ann", "a"),
                admit("c", limit, cost=6),
                Release("ann", "c"),
                Release("ann", "c"),
            ],
            NOW,
        )
        assert isinstance(outcomes[0], Allowed)
        assert isinstance(outcomes[1], Refused)
        assert outcomes[3] == Ended("released")
        assert isinstance(outcomes[4], Allowed)
        assert (outcomes[4].used, outcomes[4].held) == ((4,), (0,))
        assert outcomes[5:] == [Ended("released"), Ended("gone")]

    async def test_customers_are_apart(self, backend: Backend) -> None:
        """What one does changes nothing for another, the same ids or not."""
        await allowed(backend, admit("a", rate(1), total(5), cost=5))
        await recorded(backend, record("e", 5, admission="a"))
        answer = await allowed(backend, admit("a", rate(1), total(5), customer="bob", cost=5))
        assert (answer.used, answer.held) == ((0, 0), (0, 0))
        assert (await recorded(backend, record("e", 4, customer="bob", admission="a"))).new

    async def test_time_does_not_go_back(self, backend: Backend) -> None:
        """An earlier time counts as the latest one that was applied."""
        await allowed(backend, admit("a", total(5), cost=5, ttl_ms=1000), NOW)
        await allowed(backend, admit("b", total(5), cost=5, ttl_ms=1000), NOW + 1000)
        answer = await refused(backend, admit("c", total(5), cost=1), NOW - 5000)
        assert answer.now == NOW + 1000

    @pytest.mark.parametrize("amount", BOUNDARIES)
    async def test_amounts_are_exact_up_to_the_largest(self, backend: Backend, amount: int) -> None:
        """One nano-USD more or less decides, from 0 to 9.0e15."""
        if amount:
            await recorded(backend, record("e", amount - 1))
            await allowed(backend, admit("a", total(amount), cost=1))
            assert (await refused(backend, admit("b", total(amount), cost=1))).reasons == ("held",)
            assert (await backend.standing("ann", [total(amount)], now=NOW)).used == (amount - 1,)
            await recorded(backend, record("f", 1, admission="a"))
        answer = await refused(backend, admit("c", total(amount), cost=MAX))
        assert (answer.reasons, answer.used, answer.held) == (("exhausted",), (amount,), (0,))
        assert (await refused(backend, admit("d", total(amount), cost=(1 << 53) - 1))).used == (amount,)
