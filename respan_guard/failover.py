"""What happens to an admission that storage gave no answer to: the failure mode of each limit that applies.

"closed" refuses with 503, "open" lets in as if there were no such limit, "local" goes by a share of the limit that
belongs to this process alone: of a rate, `local_share` of its amount; of a budget, `local_share` of what was left of
it when storage last said so. Shares are never merged with the store or with other processes': R processes together
let in at most R shares. Budgets that all customers share have no local share, because what was left of them is known
of one customer at a time: for them "local" is "closed". What is spent meanwhile is recorded as ever, and booked once
storage is back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from respan_guard.admission import Admission
from respan_guard.backends.base import Admit, Allowed, Refused, Release
from respan_guard.backends.memory import MemoryBackend
from respan_guard.decision import BLOCKED, Decision
from respan_guard.errors import (
    BackendError,
    ConfigurationError,
    CustomerBlocked,
    RateLimitExceeded,
    StorageUnavailable,
)
from respan_guard.local_shares import Account, LocalLane

if TYPE_CHECKING:
    from respan_guard.backends.base import Limit
    from respan_guard.estimates import Ask
    from respan_guard.guard import Guard
    from respan_guard.homes import Homes
    from respan_guard.lanes import Lane
    from respan_guard.policies import KnownPolicy
    from respan_guard.policy import Terms

__all__ = ["Failover", "unavailable"]

logger = logging.getLogger("respan_guard")
T = TypeVar("T")
_LOG_EVERY = 10.0
_PARTS = 1_000_000
_SETTLING = 30.0  # seconds: who was to find out what is stored may have gone with its home
_NOBODY = Allowed(now=0)


def unavailable(error: BackendError) -> StorageUnavailable:
    """What a request is told, whatever is wrong with storage."""
    return error if isinstance(error, StorageUnavailable) else StorageUnavailable(str(error))


class RatesUnavailable(StorageUnavailable):
    """The storage of rates gave no answer, and rates fail closed, whatever budgets do."""


class Failover:
    """Decides without storage.

    Attributes:
        remember: Takes each decision that storage made, what it holds, nano-USD, and what `stored` said before it was
            asked; None where nobody asks for them.
        closed: Whether any kind of limit is closed.
    """

    def __init__(self, guard: Guard, homes: Homes) -> None:
        settings = guard.settings
        self._guard = guard
        self._homes = homes
        self._budgets = settings.budget_failure
        self._rates = settings.rate_limit_failure
        self._parts = round(settings.local_share * _PARTS)
        self._rated = settings.rate_limit_storage is not None
        self._size = settings.max_cached_customers
        self._lock = threading.Lock()
        self._accounts: dict[str, Account] = {}
        self._windows = MemoryBackend(max_customers=self._size)  # above it only those whose windows still count
        self._settling_until = 0.0
        self._logged_at = float("-inf")
        self.closed = "closed" in (self._budgets, self._rates)
        self.remember: Callable[[Decision, int, int], None] | None = None
        if self._budgets == "local":
            self.remember = self._remember

    def forget(self) -> None:
        """After a fork: another thread's lock would be held for ever in the child."""
        self._lock = threading.Lock()
        self._settling_until = 0.0
        self._windows.abandon()

    def unusable(self, error: BackendError | ConfigurationError) -> StorageUnavailable:
        """What a request is told; what is wrong for good is said in the log, for whoever runs it."""
        if not isinstance(error, ConfigurationError):
            return unavailable(error)
        now = self._guard.clock.monotonic()
        if now - self._logged_at >= _LOG_EVERY:
            self._logged_at = now
            logger.error("storage can't be used: %s", error)
        return StorageUnavailable("storage can't be used as it is configured")

    def admit(
        self,
        error: BackendError,
        lane: Lane,
        op_id: str,
        customer: str,
        known: KnownPolicy,
        terms: Terms,
        ask: Ask,
        requests: int,
    ) -> Admission:
        """Let the customer in, or raise, by the failure modes.

        Raises:
            StorageUnavailable: A limit applies, or may apply, that fails closed; or its local share is used up.
            RateLimitExceeded: The local share of a rate is used up.
            CustomerBlocked: The customer was blocked when storage was last heard.
        """
        if isinstance(error, RatesUnavailable):
            raise error
        guard = self._guard
        decision = Decision(customer, (), (), _NOBODY, requests)
        if not guard.switch.shadow:
            guard.policies.missed(guard.clock.monotonic())
            # A customer that this process hasn't met may have limits of its own, unless it is known that none has.
            stranger = not known.revision and customer not in self._accounts and not guard.policies.none_own
            if stranger and (self._budgets != "open" or self._rates == "closed"):
                raise unavailable(error) from error
            rates: list[Limit] = []
            budgets: list[Limit] = []
            for limit in terms.limits:
                if limit.name == BLOCKED:
                    refused = Refused(guard.now_ms(), ("exhausted",), (0,), (0,))
                    raise CustomerBlocked(Decision(customer, (limit,), (None,), refused, requests))
                if self._rated and limit.kind == "rate":
                    continue  # asked elsewhere, and before
                kind, mode = (rates, self._rates) if limit.kind == "rate" else (budgets, self._budgets)
                if mode == "closed" or (mode == "local" and limit.shared):
                    raise unavailable(error) from error
                if mode == "local":
                    kind.append(limit)
            if rates and requests:
                decision = self._by_rates(op_id, customer, terms, tuple(rates), requests)
            if budgets:
                account = self._by_budgets(error, customer, budgets, ask)
                lane = LocalLane(guard.lane, lane, account, ask.cost)
        local = isinstance(lane, LocalLane)
        # It has no hold in the store; but a call whose usage stays unknown is presumed to have cost what it asked for.
        return Admission(guard, lane, op_id, decision, day=terms.day, held=ask.cost, stored=False, local=local)

    def without_rates(
        self, error: StorageUnavailable, op: Admit, terms: Terms, rates: tuple[Limit, ...], requests: int
    ) -> None:
        """Go on although the storage of rates, which is another one, gave no answer; or raise as `admit` does."""
        if self._guard.switch.shadow or self._rates == "open":
            return
        if self._rates == "closed":
            raise RatesUnavailable(str(error)) from error
        self._by_rates(op.id, op.customer, terms, rates, requests)

    def _by_rates(self, op_id: str, customer: str, terms: Terms, rates: tuple[Limit, ...], requests: int) -> Decision:
        """The rates' shares, in a store of this process."""
        local = tuple(replace(rate, amount=self._share(rate.amount)) for rate in rates)
        ask = Admit(
            op_id, customer, "", terms.day, terms.day_from_ms, terms.day_to_ms, local, requests=requests, ttl_ms=1000
        )
        outcome = self._windows.apply_now((ask, Release(customer, op_id)), self._guard.now_ms())[0]
        if not isinstance(outcome, (Allowed, Refused)):  # midnight passed just now
            return Decision(customer, (), (), _NOBODY, requests)
        decision = Decision(customer, local, (None,) * len(local), outcome, requests)
        if not decision.allowed:
            self._guard.refusals.add(decision)
            raise RateLimitExceeded(decision)
        return decision

    def _share(self, amount: int) -> int:
        return max(1, amount * self._parts // _PARTS) if amount else 0

    def _by_budgets(self, error: BackendError, customer: str, budgets: list[Limit], ask: Ask) -> Account:
        """The budgets' shares, of what was last known to be left."""
        with self._lock:
            account = self._accounts.get(customer)
            for budget in budgets:
                left = 0 if account is None else account.left(budget)
                allowance = max(0, left) * self._parts // _PARTS
                taken = 0 if account is None else account.spent + account.held
                if taken + ask.cost > allowance or (taken >= allowance and not (ask.free and not ask.cost)):
                    raise StorageUnavailable(
                        f"{unavailable(error)}; this process's share of {budget.name} is used up or was never known"
                    ) from error
            assert account is not None
            account.held += ask.cost
            return account

    def stored(self, customer: str) -> int:
        """What is known to be in the store of all that was recorded without it for a customer, nano-USD.

        Records wait in the inboxes of two homes and in the journal: the store may answer before it has them.
        """
        account = self._accounts.get(customer)
        if account is None or account.total == account.known:
            return 0
        guard = self._guard
        if not account.sending and self._homes.settled:
            account.stored = account.total
        elif (now := guard.clock.monotonic()) >= self._settling_until:
            self._settling_until = now + _SETTLING
            guard.lane().post_call(lambda _: self._settle())
        return account.stored

    async def _settle(self) -> None:
        """Wait until all that was recorded so far has left the inboxes, however busy they are."""
        try:
            with self._lock:
                recorded = [(account, account.total) for account in self._accounts.values() if not account.sending]
            await self._homes.flush()
            if not self._homes.journalled:
                for account, total in recorded:
                    account.stored = max(account.stored, total)
        finally:
            self._settling_until = 0.0

    def _remember(self, decision: Decision, hold: int, stored: int) -> None:
        customer = decision.customer_identifier
        account = self._accounts.get(customer)
        if account is None:
            with self._lock:
                if len(self._accounts) >= self._size:
                    self._accounts.pop(next(iter(self._accounts)), None)
                account = self._accounts.setdefault(customer, Account())
        account.decision, account.hold = decision, hold
        if stored > account.known:
            account.known = stored
