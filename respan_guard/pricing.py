"""What LLM calls cost: the app's own price table first, then `genai-prices`.

`genai_prices.calc_price` takes about 100 microseconds a call. Here a model is resolved once, to integers
(`price_plans.Rates`), and the answer stays the same to the nano-USD.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from respan_guard.clock import Clock, SystemClock
from respan_guard.money import to_nano
from respan_guard.price_data import Plan
from respan_guard.price_plans import Segment
from respan_guard.price_table import OwnPrice
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot

__all__ = ["Explanation", "PriceBook"]

MAX_NAMES = 4_096
"""Names of models that are remembered, found or not; clients may send any number of them."""

# OpenTelemetry's names of providers, where genai-prices doesn't know them.
_PROVIDERS = {
    "azure.ai.openai": "azure",
    "azure.ai.inference": "azure",
    "mistral_ai": "mistral",
    "x_ai": "x-ai",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a model costs and where the numbers are from.

    Attributes:
        model: The name asked for.
        source: "prices" (the setting), "genai-prices 0.2.3", or None if no price is known.
        provider: Whose price it is.
        matched: The entry that the name matched.
        rates: USD per million tokens by kind ("input", "output", "cache_read", ...); "request" is USD per request.
        long_input: Rates for calls with more input than so many tokens.
        service_tiers: Rates by service tier, where they differ.
        detail: One sentence for people.
    """

    model: str
    source: str | None
    provider: str | None = None
    matched: str | None = None
    rates: Mapping[str, Decimal] = field(default_factory=dict)
    long_input: Mapping[int, Mapping[str, Decimal]] = field(default_factory=dict)
    service_tiers: Mapping[str, Mapping[str, Decimal]] = field(default_factory=dict)
    detail: str = ""


class PriceBook:
    """Prices calls.

    Args:
        user_prices: USD per million tokens by model, `{"my-model": {"input": 0.5, "output": 1.5}}`, the key a
            model or "provider/model". Further names: see `price_plans.KINDS`, "request", USD per request, and
            "context_window", the tokens that the model reads at most. 0 is a known price.
        clock: The time, for prices that change with it.

    Raises:
        ConfigurationError: An entry is malformed.
    """

    def __init__(self, user_prices: Mapping[str, Any] | None = None, *, clock: Clock | None = None) -> None:
        self._own = {name.strip().lower(): OwnPrice(name, p) for name, p in (user_prices or {}).items()}
        self._clock = clock or SystemClock()
        self._lock = threading.RLock()  # a finalizer may price a call while its own thread makes a plan
        self._get_snapshot: Callable[[], DataSnapshot | None] = _no_snapshot
        self._snapshot: DataSnapshot | None = None
        self._plans: dict[tuple[str, str], Plan] = {}
        self._find = functools.lru_cache(MAX_NAMES)(self._search)

    def forget(self) -> None:
        """After a fork: another thread's lock would be held for ever in the child."""
        self._lock = threading.RLock()

    def load(self) -> None:
        """Import genai-prices now (a fifth of a second) instead of at the first model that needs it."""
        self._prices()

    def cost(self, usage: Usage, at: datetime | None = None) -> int | None:
        """What the usage costs by the price tables, in nano-USD; `usage.cost` plays no part.

        By the model asked for, or by the one that answered if that is dearer (a fallback, another deployment) or the
        first has no price. Only an entry of the app's own for the model asked for is the last word.

        Args:
            usage: The tokens.
            at: When (aware); `usage.time`, else now, when omitted.

        Returns:
            The cost, rounded half to even; None if no price is known, which is not zero.
        """
        return self._costs(usage, at)[0]

    def _costs(self, usage: Usage, at: datetime | None) -> tuple[int | None, int | None]:
        """See `cost`; and by the dearer of both models, whoever set their prices."""
        if at is None:
            at = usage.time
        if self._get_snapshot() is not self._snapshot:
            self._prices()
        asked, found = self._find(usage.provider, usage.model), None
        now, tier, other_model = self._ms(at), usage.service_tier, usage.response_model
        if asked is not None and (rates := asked.rates(now, tier)) is not None:
            found = rates.cost(usage)
        if not other_model or other_model == usage.model:
            return found, found
        answered = self._find(usage.provider, other_model)
        if answered is asked or answered is None or (rates := answered.rates(now, tier)) is None:
            return found, found
        other = rates.cost(usage)
        dearest = other if found is None else max(found, other)
        own = isinstance(asked, OwnPrice) and not isinstance(answered, OwnPrice)
        return (found if own else dearest), dearest

    def accept_cost(self, usage: Usage, at: datetime | None = None) -> int | None:
        """What to charge for a usage that may claim a cost, in nano-USD.

        A claim is taken if it is within ten times of the price, either way; else the price counts. Where another model
        answered, which the server may have been free to choose, the claim is held against the dearer of both.
        Where no price is known any claim is taken but 0 for tokens used, which says nothing.

        Returns:
            The cost; None if there is neither a price nor a usable claim.
        """
        priced, dearest = self._costs(usage, at)
        if usage.cost is None:
            return priced
        claimed = to_nano(usage.cost, "cost")
        if priced is None or dearest is None:
            return claimed if claimed or not usage.total_tokens else None
        return claimed if dearest <= claimed * 10 and claimed <= dearest * 10 else priced

    def bound(
        self,
        model: str,
        provider: str | None,
        input_tokens: int,
        output_tokens: int,
        *,
        service_tier: str | None = None,
        has_audio: bool = True,
        has_images: bool = True,
        at: datetime | None = None,
    ) -> int | None:
        """The most that a call can cost, in nano-USD, rounded up.

        Each token counts at the dearest rate that one of its kind can have: any tier of long input that
        the input can reach, written to the cache, of any modality that the request allows, at any service
        tier that the provider may choose (a request without one gets what the account is set to), and at
        the prices in force now and in an hour.

        Args:
            model: The model asked for.
            provider: Whose model; guessed from its name when None.
            input_tokens: At most so many.
            output_tokens: At most so many, over all choices.
            service_tier: The tier asked for; None or "auto" leave it to the provider.
            has_audio: Whether audio may go in or come out.
            has_images: Whether images, video or files may go in.
            at: When; now when omitted.

        Returns:
            The bound; None if no price is known.
        """
        plan = self._plan(provider, model)
        if plan is None:
            return None
        most = 0
        for rates in plan.dearest(self._ms(at), None if service_tier == "auto" else service_tier):
            if rates is None:
                return None
            cost = rates.bound(input_tokens, output_tokens, has_audio=has_audio, has_images=has_images)
            if cost > most:
                most = cost
        return most

    def window(self, model: str, provider: str | None) -> int | None:
        """The model's context window in tokens, by `prices`, else by genai-prices; None if it is unknown."""
        plan = self._plan(provider, model)
        if isinstance(plan, OwnPrice) and plan.window is None:
            plan = self._bundled(*_named(provider, model))
        return None if plan is None else plan.window

    def explain(self, model: str, provider: str | None = None, at: datetime | None = None) -> Explanation:
        """Say what a model costs now, and where the number is from."""
        plan, now = self._plan(provider, model), self._ms(at)
        if isinstance(plan, OwnPrice):
            rates = _decimals(plan.rates(now, None).segments[0])
            return Explanation(
                model, "prices", provider, plan.name, rates, detail=f'From the "prices" setting, entry {plan.name!r}.'
            )
        found = None if plan is None else plan.rates(now, None)
        if plan is None or found is None:
            why = "is not charged by tokens" if plan is not None else "has no known price"
            hint = f'prices = {{"{model}": {{"input": 0.5, "output": 1.5}}}}'
            return Explanation(
                model,
                None,
                None if plan is None else plan.provider.id,
                None if plan is None else plan.info.id,
                detail=f"{model} {why}. Set one in USD per million tokens: {hint}",
            )
        tiers = {}
        for _, value in plan.tiers:
            other = plan.rates(now, value)
            if other is not None and other.segments != found.segments:
                tiers[value] = _decimals(other.segments[0])
        source = f"genai-prices {_version()}"
        return Explanation(
            model,
            source,
            plan.provider.id,
            plan.info.id,
            _decimals(found.segments[0]),
            {segment.start: _decimals(segment) for segment in found.segments[1:]},
            tiers,
            f"From {source}, provider {plan.provider.id}, model {plan.info.id}.",
        )

    def _ms(self, at: datetime | None) -> int:
        """A moment, or now. Not the other way round: prices change at whole milliseconds, and numbers are cheaper."""
        return self._clock.now_ms() if at is None else int(at.timestamp() * 1000)

    def _plan(self, provider: str | None, model: str) -> Plan | OwnPrice | None:
        if self._get_snapshot() is not self._snapshot:
            self._prices()
        return self._find(provider, model)

    def _search(self, provider: str | None, model: str) -> Plan | OwnPrice | None:
        whose, model = _named(provider, model)
        if not model:
            return None
        for name in (f"{provider}/{model}".lower(), f"{whose}/{model}", model, model.partition("/")[2]):
            if name in self._own:
                return self._own[name]
        return self._bundled(whose, model)

    def _bundled(self, whose: str | None, model: str) -> Plan | None:
        snapshot = self._prices()
        for owner, name in _readings(whose, model):
            try:
                found, info = snapshot.find_provider_model(name, None, owner, None)
            except LookupError:
                continue
            key = (found.id, info.id)
            with self._lock:
                plan = self._plans.get(key)
                if plan is None or plan.info is not info:
                    plan = self._plans[key] = Plan(found, info)
            return plan
        return None

    def _prices(self) -> DataSnapshot:
        """The price data in force; it changes when genai-prices updates itself."""
        if self._get_snapshot is _no_snapshot:
            from genai_prices.data_snapshot import get_snapshot

            self._get_snapshot = get_snapshot
        snapshot = self._get_snapshot()
        assert snapshot is not None
        if snapshot is not self._snapshot:
            with self._lock:
                self._plans = {}
            self._snapshot = snapshot
            self._find.cache_clear()
        # It remembers every name that it was ever asked for. Ours are bounded, so its are of no use.
        for cache in (
            getattr(snapshot, name, None) for name in ("_lookup_cache", "_provider_cache", "_provider_misses")
        ):
            if cache:
                cache.clear()
        return snapshot


def _no_snapshot() -> None:
    """Stands in for genai-prices' own function until a model needs it."""


def _named(provider: str | None, model: str) -> tuple[str | None, str]:
    """Provider and model as the tables spell them."""
    whose = provider.strip().lower() if provider else None
    return (_PROVIDERS.get(whose, whose) if whose else None), model.strip().lower().removeprefix("models/")


def _readings(provider: str | None, model: str) -> Iterator[tuple[str | None, str]]:
    """Ways to read a name, best first: as the provider's, as "provider/model", as anybody's, as OpenRouter's."""
    if provider is not None:
        yield provider, model
    before, slash, rest = model.partition("/")
    if slash and before and rest:
        yield before, rest
    yield None, model
    if slash and rest:
        yield None, rest
        yield "openrouter", model


def _decimals(segment: Segment) -> dict[str, Decimal]:
    return {name: Decimal(price.numerator) / Decimal(price.denominator) for name, price in segment.prices.items()}


def _version() -> str:
    from importlib.metadata import version

    return version("genai-prices")
