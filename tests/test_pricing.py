"""Prices: equal to genai-prices on every model it knows, bounds that hold, and an own table that comes first."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Any

import genai_prices
import pytest
from genai_prices.data_snapshot import DataSnapshot, get_snapshot, set_custom_snapshot
from genai_prices.types import ModelInfo, ModelPrice, Provider
from hypothesis import example, given, settings
from hypothesis import strategies as st

from respan_guard.errors import ConfigurationError
from respan_guard.price_data import Plan, compile_rates
from respan_guard.price_plans import KINDS, Rates, Segment
from respan_guard.pricing import MAX_NAMES, PriceBook
from respan_guard.usage import Usage


def ms(at: datetime) -> int:
    """A moment as plans take it."""
    return int(at.timestamp() * 1000)


NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
MOMENTS = (NOON, datetime(2026, 11, 24, 17, 0, tzinfo=UTC), datetime(2024, 1, 31, 23, 59, tzinfo=UTC))
TIERS = (None, "default", "flex", "priority", "fast", "batch", "no-such-tier")
MODELS = [(p, m) for p in get_snapshot().providers for m in p.models]
PRICED = [(p, m) for p, m in MODELS if Plan(p, m).rates(ms(NOON), None) is not None]
PLAN_OF = {(p.id, m.id): Plan(p, m) for p, m in MODELS}


class StillClock:
    """A clock that shows one moment."""

    def now_ms(self) -> int:
        """Noon."""
        return ms(NOON)

    def monotonic(self) -> float:
        """Zero."""
        return 0.0


def reported(usage: Usage) -> dict[str, int]:
    """The usage in the words of genai-prices."""
    counts = {name: getattr(usage, name) for name in KINDS.values()}
    counts["output_reasoning_tokens"] = counts.pop("reasoning_tokens")
    return counts


def calculated(provider: Provider, info: ModelInfo, usage: Usage, at: datetime, tier: str | None) -> int | None:
    """What genai-prices itself answers, in nano-USD; None where it raises."""
    context = {"service_tier": tier, "processing": tier, "speed": tier} if tier else None
    try:
        price = info.calc_price(reported(usage), provider, genai_request_timestamp=at, price_context=context)
    except ValueError:
        return None
    return int((price.total_price * 10**9).to_integral_value(ROUND_HALF_EVEN))


def consistent(rng: random.Random) -> Usage:
    """A usage whose parts fit into their wholes, around the thresholds of long input now and then."""
    size = rng.choice((0, 1, 7, 999, 32_000, 128_001, 200_000, 272_000, 272_001, rng.randrange(10**6), 10**12))
    read, write, audio, image, video = (rng.randrange(size // 5 + 1) if rng.random() < 0.5 else 0 for _ in range(5))
    made = rng.choice((0, 1, 3, rng.randrange(100_000)))
    reasoning, spoken, drawn, filmed = (rng.randrange(made // 4 + 1) if rng.random() < 0.5 else 0 for _ in range(4))
    heard = rng.randrange(min(read, audio) + 1)
    return Usage(
        model="-",
        input_tokens=size,
        output_tokens=made,
        cache_read_tokens=read,
        cache_write_tokens=write,
        cache_write_1h_tokens=rng.randrange(write + 1),
        input_audio_tokens=audio,
        cache_audio_read_tokens=heard,
        input_image_tokens=image,
        cache_image_read_tokens=rng.randrange(min(read - heard, image) + 1),
        input_video_tokens=video,
        reasoning_tokens=reasoning,
        output_audio_tokens=spoken,
        output_image_tokens=drawn,
        output_video_tokens=filmed,
    )


@pytest.mark.parametrize("provider", get_snapshot().providers, ids=lambda p: p.id)
def test_equals_genai_prices_on_every_model(provider: Provider) -> None:
    """Every bundled model costs exactly what calc_price says: cached, audio, long input, tiers, at any time."""
    rng = random.Random(provider.id)
    for info in provider.models:
        plan = PLAN_OF[provider.id, info.id]
        for at in MOMENTS:
            tier = rng.choice(TIERS)
            usage = consistent(rng)
            rates = plan.rates(ms(at), tier)
            if rates is not None:
                want = calculated(provider, info, usage, at, tier)
                assert want is not None
                assert rates.cost(usage) == want, (info.id, usage, at, tier)


def test_every_service_tier_of_every_model_equals_genai_prices() -> None:
    """No tier's prices are left out: for each model with variants, each tier is compared."""
    rng = random.Random(5)
    compared = 0
    for provider, info in PRICED:
        plan = PLAN_OF[provider.id, info.id]
        for _, tier in plan.tiers:
            usage = consistent(rng)
            rates = plan.rates(ms(NOON), tier)
            assert rates is not None
            assert rates.cost(usage) == calculated(provider, info, usage, NOON, tier), (info.id, tier)
            compared += 1
    assert compared > 100


def test_only_models_without_token_prices_are_unknown() -> None:
    """A model charged by hours, characters or pages only has no known price here; every other one has."""
    unknown = [m for p, m in MODELS if PLAN_OF[p.id, m.id].rates(ms(NOON), None) is None]
    for info in unknown:
        names = {name for name, price in vars(info.get_prices(NOON)).items() if price is not None}
        assert names
        assert not any(name.endswith("mtok") or name == "requests_kcount" for name in names), info.id
    assert len(unknown) < 40


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_contradicting_counts_cost_the_dearest_rate_and_only_those(data: st.DataObject) -> None:
    """Where calc_price raises, and only there, the tokens are charged at the dearest rate, never at nothing."""
    provider, info = data.draw(st.sampled_from(PRICED))
    rates = PLAN_OF[provider.id, info.id].rates(ms(NOON), None)
    assert rates is not None
    counts: dict[str, Any] = {name: data.draw(st.integers(0, 50), label=name) for name in KINDS.values()}
    usage = Usage(model="-", **counts)
    want = calculated(provider, info, usage, NOON, None)
    if want is not None:
        assert rates.cost(usage) == want
    else:
        given_tokens, made = usage.input_tokens, usage.output_tokens
        assert rates.cost(usage) >= rates.bound(given_tokens, made) >= 0


def test_bound_holds_for_generated_calls() -> None:
    """5,000 calls of random models, sizes, kinds and tiers: none costs more than its bound."""
    rng = random.Random(2)
    book = PriceBook(clock=StillClock())
    checked = 0
    while checked < 5_000:
        provider, info = rng.choice(PRICED)
        usage = consistent(rng)
        usage.provider, usage.model = provider.id, info.id
        asked = rng.choice((None, "auto", "flex", "priority"))
        usage.service_tier = rng.choice(TIERS) if asked in (None, "auto") else rng.choice((asked, "default", None))
        if usage.service_tier in ("fast", "batch"):
            usage.service_tier = None
        more = rng.choice((0, 1, 5_000))
        cost = book.cost(usage)
        if cost is None:
            continue
        bound = book.bound(
            usage.model,
            usage.provider,
            usage.input_tokens + more,
            usage.output_tokens + more,
            service_tier=asked,
            has_audio=bool(usage.input_audio_tokens or usage.output_audio_tokens),
            has_images=bool(usage.input_image_tokens or usage.input_video_tokens),
        )
        assert bound is not None
        assert bound >= cost, (info.id, usage, asked)
        checked += 1


def test_bound_is_the_most_of_all_prices_that_a_call_may_meet() -> None:
    """For every bundled model and around every threshold: what is left out of the plan never sets a bound."""
    for provider, info in PRICED:
        plan = PLAN_OF[provider.id, info.id]
        tiers = [None, *(value for name, value in plan.tiers if name == "service_tier")]
        met = [plan.rates(ms(NOON + late), tier) for tier in tiers for late in (timedelta(), timedelta(hours=1))]
        for size in (0, 1, 999, 128_001, 200_000, 200_001, 272_001, 10**9):
            for audio, images in ((False, False), (True, False), (False, True)):
                most, found = (
                    max(-1 if r is None else r.bound(size, 7_919, has_audio=audio, has_images=images) for r in rates)
                    for rates in (met, plan.dearest(ms(NOON), None))
                )
                assert None in met or found == most, (info.id, size)


def test_bound_counts_long_input_at_its_tier() -> None:
    """A call that may cross the threshold of long input is held at the higher price, output included."""
    book = PriceBook(clock=StillClock())
    at_edge = book.bound("claude-sonnet-4-5", "anthropic", 200_000, 1_000)
    beyond = book.bound("claude-sonnet-4-5", "anthropic", 200_001, 1_000)
    assert at_edge == 200_000 * 6_000 + 1_000 * 15_000  # written to the cache for an hour is the dearest input
    assert beyond == 200_001 * 12_000 + 1_000 * 22_500


def test_bound_leaves_out_what_the_request_excludes() -> None:
    """Audio rates count only for calls with audio, dear tiers only if the request leaves the tier open."""
    book = PriceBook({"m": {"input": 1, "output": 2, "input_audio": 50, "output_audio": 70, "input_image": 9}})
    assert book.bound("m", None, 1_000, 100) == 1_000 * 50_000 + 100 * 70_000
    assert book.bound("m", None, 1_000, 100, has_audio=False) == 1_000 * 9_000 + 100 * 2_000
    assert book.bound("m", None, 1_000, 100, has_audio=False, has_images=False) == 1_000 * 1_000 + 100 * 2_000
    left_open = PriceBook(clock=StillClock()).bound("gpt-4o", "openai", 1_000, 0)
    fixed = PriceBook(clock=StillClock()).bound("gpt-4o", "openai", 1_000, 0, service_tier="default")
    assert left_open == 1_000 * 4_250
    assert fixed == 1_000 * 2_500


def test_video_has_its_price_and_bounds_heed_it() -> None:
    """Video tokens cost what genai-prices says, in and out; the bound of any call that may hold or make some does too.

    Which requests make video none of them says, so all output of such a model is held at its price.
    """
    book = PriceBook(clock=StillClock())
    made = Usage("gemini-omni-flash-preview", 1_000, 50_000, output_video_tokens=50_000, provider="google")
    assert book.cost(made) == 876_500_000
    assert book.bound("gemini-omni-flash-preview", "google", 1_000, 50_000, has_audio=False, has_images=False) == (
        876_500_000
    )
    shown = Usage("gemini-embedding-2", 1_000_000, input_video_tokens=1_000_000, provider="google")
    assert book.cost(shown) == 12_000_000_000
    assert book.bound("gemini-embedding-2", "google", 1_000_000, 0, has_audio=False) == 12_000_000_000
    text = book.bound("gemini-embedding-2", "google", 1_000_000, 0, has_audio=False, has_images=False)
    assert text == 200_000_000


def test_bounds_heed_prices_of_what_is_not_counted() -> None:
    """A token that `Usage` has no count for may still be the dearest; no bound is below its price."""
    prices = {"input_mtok": 1, "output_mtok": 2, "output_citation_mtok": 50, "input_tool_mtok": 7}
    rates = compile_rates(ModelPrice(**{name: Decimal(usd) for name, usd in prices.items()}), "m")
    assert rates is not None
    assert rates.cost(Usage("m", 1_000, 100)) == 1_000 * 1_000 + 100 * 2_000
    assert rates.bound(1_000, 100, has_audio=False, has_images=False) == 1_000 * 7_000 + 100 * 50_000


def test_cached_images_have_their_price() -> None:
    """Images read from the cache cost the cached image's price, not the dearest rate that any token can have."""
    book = PriceBook(clock=StillClock())
    usage = Usage("gpt-image-1.5", 2_000, cache_read_tokens=1_500, input_image_tokens=1_900, provider="openai")
    usage.cache_image_read_tokens = 1_500
    assert book.cost(usage) == 1_500 * 2_000 + 400 * 8_000 + 100 * 5_000
    own = PriceBook({"m": {"input": 1, "output": 1, "cache_read": "0.1", "input_image": 4}})
    assert own.cost(Usage("m", 10, cache_read_tokens=9, input_image_tokens=9, cache_image_read_tokens=9)) == 37_000


def test_bound_sees_a_price_that_starts_within_the_hour() -> None:
    """A call admitted just before a price changes is held at the dearer of both prices."""
    for provider, info in PRICED:
        constraints = PLAN_OF[provider.id, info.id]._constraints
        if constraints and any(hasattr(c, "start_time") for c in constraints):
            plan = PLAN_OF[provider.id, info.id]
            for minute in range(0, 24 * 60, 30):
                at = NOON + timedelta(minutes=minute)
                now, later = plan.rates(ms(at), None), plan.rates(ms(at + timedelta(minutes=59)), None)
                assert now is not None
                assert later is not None
                bound = PriceBook().bound(info.id, provider.id, 1_000, 1_000, at=at)
                if bound is not None:
                    assert bound >= max(now.cost(Usage("m", 1_000, 1_000)), later.cost(Usage("m", 1_000, 1_000)))
            return
    pytest.fail("no model has a price by time of day")


def test_rounds_half_to_even_once() -> None:
    """Prices finer than a nano-USD per token are exact; the sum is rounded once, half to even."""
    book = PriceBook({"fine": {"input": "0.0001", "output": "0.0025"}})
    assert book.cost(Usage("fine", 5, 0)) == 0  # 0.5 nano
    assert book.cost(Usage("fine", 15, 0)) == 2  # 1.5 nano
    assert book.cost(Usage("fine", 25, 0)) == 2  # 2.5 nano
    assert book.cost(Usage("fine", 4, 1)) == 3  # 0.4 + 2.5, not 0 + 2
    assert book.bound("fine", None, 1, 0) == 1


@example([("0.0000003", 7), ("3", 10**12)])
@given(st.lists(st.tuples(st.decimals("0", "1000", places=9).map(str), st.integers(0, 10**12)), min_size=2, max_size=2))
def test_own_prices_are_exact(sides: list[tuple[str, int]]) -> None:
    """An own price costs tokens times price, computed in Decimal, whatever its digits."""
    (given_price, given_tokens), (made_price, made_tokens) = sides
    book = PriceBook({"m": {"input": given_price, "output": made_price}})
    exact = (Decimal(given_price) * given_tokens + Decimal(made_price) * made_tokens) * 1000
    assert book.cost(Usage("m", given_tokens, made_tokens)) == int(exact.to_integral_value(ROUND_HALF_EVEN))


def test_own_prices_come_first_and_parts_inherit() -> None:
    """The setting beats genai-prices, provider/model beats model, and a part without a price costs like its whole."""
    book = PriceBook({"gpt-4o": {"input": 1, "output": 2}, "azure/gpt-4o": {"input": 3, "output": 4, "cache_read": 1}})
    assert book.cost(Usage("gpt-4o", 10, 10, provider="openai", cache_read_tokens=5)) == 10 * 1_000 + 10 * 2_000
    assert book.cost(Usage("gpt-4o", 10, 10, provider="azure.ai.openai")) == 10 * 3_000 + 10 * 4_000
    assert book.cost(Usage("gpt-4o", 10, 0, provider="azure", cache_read_tokens=4)) == 6 * 3_000 + 4 * 1_000
    assert book.cost(Usage("GPT-4o", 10, 10)) == 10 * 1_000 + 10 * 2_000
    assert book.cost(Usage("openai/gpt-4o", 10, 10)) == 10 * 1_000 + 10 * 2_000


def test_own_price_of_zero_is_known_and_free() -> None:
    """A model priced 0 is free, which is not the same as unknown."""
    book = PriceBook({"local": {"input": 0, "output": 0}})
    assert book.cost(Usage("local", 10**9, 10**9)) == 0
    assert book.bound("local", None, 10**9, 10**9) == 0
    assert book.explain("local").source == "prices"


def test_own_price_of_every_kind_counts() -> None:
    """Each name of the table prices its own tokens, and a request has a price too."""
    prices = {name: 2**n for n, name in enumerate(KINDS)}
    book = PriceBook({"m": {**prices, "request": "0.5"}})
    for name, count in KINDS.items():
        counts: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, count: 1}
        parents = {
            "cache_write_1h": ["cache_write"],
            "cache_audio_read": ["cache_read", "input_audio"],
            "cache_image_read": ["cache_read", "input_image"],
        }.get(name, [])
        side = "output_tokens" if name.startswith("output") or name == "reasoning" else "input_tokens"
        counts.update({side: 1, **{KINDS[parent]: 1 for parent in parents}})
        assert book.cost(Usage("m", **counts)) == 500_000_000 + prices[name] * 1_000, name


@pytest.mark.parametrize(
    ("prices", "says"),
    [
        ({"m": {"input": 1, "output": 1, "cached": 1}}, "names are input, output, cache_read"),
        ({"m": {"input": -1, "output": 1}}, "from 0 to 1,000,000"),
        ({"m": {"input": float("nan"), "output": 1}}, "from 0 to 1,000,000"),
        ({"m": {"input": float("inf"), "output": 1}}, "from 0 to 1,000,000"),
        ({"m": {"input": "cheap", "output": 1}}, "from 0 to 1,000,000"),
        ({"m": {"input": True, "output": 1}}, "from 0 to 1,000,000"),
        ({"m": {"input": None, "output": 1}}, "from 0 to 1,000,000"),
        ({"m": {"input": 1}}, 'lacks "output"; set it to 0 if that is free'),
        ({"m": {"input": 1, "output": 1, "context_window": 0}}, "must be from 1 to 1,000,000,000 tokens"),
        ({"m": {"input": 1, "output": 1, "context_window": 1.5}}, "must be from 1 to 1,000,000,000 tokens"),
        ({"m": 3}, "must be like"),
    ],
)
def test_malformed_own_prices_are_configuration_errors(prices: Any, says: str) -> None:
    """A price that can't be meant is refused at start-up, by a message with the model and what would be right."""
    with pytest.raises(ConfigurationError, match=says) as error:
        PriceBook(prices)
    assert "'m'" in str(error.value)


@pytest.mark.parametrize(
    ("model", "provider", "matched"),
    [
        ("gpt-4o", None, "openai gpt-4o"),
        ("gpt-4o", "openai", "openai gpt-4o"),
        ("GPT-4o-2024-08-06", "OpenAI", "openai gpt-4o"),
        ("openai/gpt-4o", "openai", "openai gpt-4o"),
        ("anthropic/claude-sonnet-4-5", "openai", "anthropic claude-sonnet-4-5"),
        ("claude-sonnet-4-5-20250929", "anthropic", "anthropic claude-sonnet-4-5"),
        ("models/gemini-2.5-pro", "google", "google gemini-2.5-pro"),
        ("gemini-2.5-pro", "gcp.gemini", "google gemini-2.5-pro"),
        ("gpt-4o", "my-own-proxy", "openai gpt-4o"),
        ("mistral-large-latest", "openai", "mistral mistral-large"),
        ("meta-llama/llama-3.3-70b-instruct", "openai", "openrouter meta-llama/llama-3.3-70b-instruct"),
        ("nonsense", "openai", None),
        ("", "openai", None),
        ("/", None, None),
        ("whisper-1", "openai", None),
    ],
)
def test_names_of_models(model: str, provider: str | None, matched: str | None) -> None:
    """A model is found by name, alias, dated name, prefix and provider; what isn't priced by tokens isn't found."""
    found = PriceBook(clock=StillClock()).explain(model, provider)
    assert (f"{found.provider} {found.matched}" if found.source else None) == matched


def test_response_model_is_the_second_try() -> None:
    """A deployment's own name has no price; the model that answered has."""
    book = PriceBook()
    usage = Usage("my-deployment", 1_000, 0, provider="azure", response_model="gpt-4o-2024-08-06")
    assert book.cost(usage, NOON) == 2_500_000
    assert book.cost(Usage("my-deployment", 1_000, 0, provider="azure"), NOON) is None
    assert book.cost(Usage("", 1_000, 0), NOON) is None


@pytest.mark.parametrize(
    ("prices", "model", "answered", "cost"),
    [
        ({}, "gpt-4o-mini", "gpt-4-0613", 30_000_000),
        ({}, "gpt-4-0613", "gpt-4o-mini", 30_000_000),
        ({}, "gpt-4o", "gpt-4o-2024-08-06", 2_500_000),
        ({}, "gpt-4o", "nonsense", 2_500_000),
        ({"mine": {"input": 1, "output": 1}}, "mine", "gpt-4-0613", 1_000_000),
        ({"mine": {"input": 0, "output": 0}, "other": {"input": 1, "output": 1}}, "mine", "other", 1_000_000),
    ],
)
def test_the_dearer_of_the_models_asked_for_and_answering(prices: Any, model: str, answered: str, cost: int) -> None:
    """Who asks chooses no price below that of what was served; only an own price for the model is the last word."""
    usage = Usage(model, 1_000, 0, provider="openai", response_model=answered)
    assert PriceBook(prices).cost(usage, NOON) == cost


def test_a_claim_is_held_against_the_model_that_answered() -> None:
    """OpenRouter may answer with a dearer one of `models`: what it says that cost is then plausible."""
    told: Any = {"provider": "openrouter", "response_model": "anthropic/claude-opus-4.1", "cost": "0.9"}
    assert PriceBook().accept_cost(Usage("openai/gpt-4o-mini", 10_000, 10_000, **told), NOON) == 900_000_000
    own = PriceBook({"mine": {"input": 0, "output": 0}})
    assert own.accept_cost(Usage("mine", 10_000, 10_000, **told), NOON) == 900_000_000


@pytest.mark.parametrize(
    ("model", "claim", "charged"),
    [
        ("gpt-4o", None, 2_500_000),
        ("gpt-4o", "0.003", 3_000_000),
        ("gpt-4o", "0.00025", 250_000),
        ("gpt-4o", "0.00024", 2_500_000),
        ("gpt-4o", "0.025", 25_000_000),
        ("gpt-4o", "0.026", 2_500_000),
        ("gpt-4o", "0", 2_500_000),
        ("unheard-of", "0.003", 3_000_000),
        ("unheard-of", "0", None),
        ("unheard-of", None, None),
    ],
)
def test_claimed_costs_are_taken_within_ten_times(model: str, claim: str | None, charged: int | None) -> None:
    """A reply's own cost counts only near the price, and 0 for tokens used says nothing."""
    usage = Usage(model, 1_000, 0, provider="openai", cost=claim)
    assert PriceBook().accept_cost(usage, NOON) == charged


def test_explains_where_a_price_is_from() -> None:
    """An explanation names source, entry, rates, long input and tiers, or says what to do."""
    book = PriceBook({"mine": {"input": 1, "output": 2, "request": "0.01"}}, clock=StillClock())
    mine = book.explain("mine")
    assert mine.rates == {"input": 1, "output": 2, "request": Decimal("0.01")}
    assert "'mine'" in mine.detail
    theirs = book.explain("claude-sonnet-4-5")
    assert theirs.source == f"genai-prices {genai_prices.__version__}"
    assert theirs.rates["cache_write_1h"] == 6
    assert theirs.long_input[200_000]["input"] == 6
    assert theirs.service_tiers["batch"]["output"] == Decimal("7.5")
    unknown = book.explain("unheard-of")
    assert (unknown.source, unknown.rates) == (None, {})
    assert 'prices = {"unheard-of": {"input": 0.5, "output": 1.5}}' in unknown.detail


def test_names_from_outside_do_not_grow_memory() -> None:
    """Names that clients make up are remembered up to a bound, here and inside genai-prices."""
    book = PriceBook()
    for n in range(MAX_NAMES + 100):
        assert book.bound(f"made-up-{n}", "openai", 1, 1) is None
    assert book._find.cache_info().currsize == MAX_NAMES
    assert len(get_snapshot()._provider_misses) < 10
    assert book.bound("gpt-4o", "openai", 1, 1) is not None


@pytest.fixture
def free_snapshot() -> Iterator[DataSnapshot]:
    """Price data in which only one model of OpenAI's exists."""
    openai = next(p for p in get_snapshot().providers if p.id == "openai")
    model = next(m for m in openai.models if m.id == "gpt-4o-mini")
    yield DataSnapshot([Provider("openai", "OpenAI", "x", model_match=openai.model_match, models=[model])], True)
    set_custom_snapshot(None)


def test_follows_updates_of_genai_prices(free_snapshot: DataSnapshot) -> None:
    """When genai-prices loads newer data, the next call is priced by it."""
    book = PriceBook()
    usage = Usage("gpt-4o", 1_000, 0, provider="openai")
    assert book.cost(usage, NOON) == 2_500_000
    set_custom_snapshot(free_snapshot)
    assert book.cost(usage, NOON) is None
    set_custom_snapshot(None)
    assert book.cost(usage, NOON) == 2_500_000


def test_prices_it_cannot_reproduce_are_unknown(caplog: pytest.LogCaptureFixture) -> None:
    """If genai-prices ever prices in a new way, that model counts as unpriced with a warning, not as wrong."""

    class Surcharged(type(MODELS[0][1].get_prices(NOON))):  # type: ignore[misc]
        def calc_price(self, usage: object) -> Any:
            return {"total_price": super().calc_price(usage)["total_price"] + Decimal(1)}

    assert compile_rates(Surcharged(input_mtok=Decimal(1), output_mtok=Decimal(2)), "odd") is None
    assert "odd" in caplog.text


def test_genai_prices_is_imported_only_when_needed() -> None:
    """Own prices cost no import of genai-prices, and neither does making a price book."""
    code = (
        "import sys; from respan_guard.pricing import PriceBook; from respan_guard.usage import Usage;"
        "b = PriceBook({'m': {'input': 1, 'output': 1}}); assert b.cost(Usage('m', 1, 1)) == 2000;"
        "assert 'genai_prices' not in sys.modules; b.load(); assert 'genai_prices' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_rates_at_the_edges_of_segments() -> None:
    """A threshold belongs to the cheaper segment, as in genai-prices: the dearer one starts above it."""
    cheap, dear = {"input": Fraction(1), "output": Fraction(0)}, {"input": Fraction(2), "output": Fraction(0)}
    rates = Rates((Segment(0, cheap), Segment(10, dear)))
    assert [rates.cost(Usage("m", n, 0)) for n in (0, 10, 11)] == [0, 10_000, 22_000]
    assert [rates.bound(n, 0) for n in (0, 10, 11)] == [0, 10_000, 22_000]


def test_context_windows() -> None:
    """The own table's word comes first, genai-prices' next, under a price of one's own too; else it is unknown."""
    own = {"input": 1, "output": 1}
    book = PriceBook({"gpt-4o": own, "mine": {**own, "context_window": 8_192}, "other": own})
    assert book.window("gpt-4o-mini", "openai") == 128_000
    assert book.window("gpt-4o", "openai") == 128_000
    assert book.window("mine", "azure") == 8_192
    assert book.window("other", "openai") is None
    assert book.window("no-such-model", "openai") is None
    assert book.cost(Usage("mine", input_tokens=1_000_000)) == 1_000_000_000
