"""Settings: keyword, else environment `RESPAN_GUARD_*`, else `respan_guard.toml`, else the default.

Nothing else is read, no `.env` and no `pyproject.toml`: a stray file must not switch enforcement off. A name
that is not known and a value that can't work are errors when the guard is made, not surprises later.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from respan_guard import option_values as checked
from respan_guard.clock import Clock, SystemClock
from respan_guard.errors import ConfigurationError
from respan_guard.option_values import DEFAULT_LIMIT_FIELDS, nearest
from respan_guard.options import FailureMode, GuardOptions, Mode, RateLimitStrategy
from respan_guard.urls import UNSHOWN, mask_url

__all__ = ["CONFIG_FILE", "CONFIG_VARIABLE", "DEFAULT_LIMIT_FIELDS", "GuardOptions", "Settings", "mask_url", "nearest"]

CONFIG_FILE: Final = "respan_guard.toml"
"""The only file that is read, from the current directory."""
CONFIG_VARIABLE: Final = "RESPAN_GUARD_CONFIG"
"""The environment variable that names another file to read instead."""
_PREFIX = "RESPAN_GUARD_"
_TEST_PREFIX = "RESPAN_GUARD_TEST_"  # where our own tests find servers
# What Kubernetes puts into every pod beside a Service that is named respan-guard: its address, by two conventions.
_OF_A_SERVICE = re.compile(
    r"RESPAN_GUARD_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_KEYWORD_ONLY = frozenset({"clock"})  # objects that no text can name

_Count = Annotated[int, BeforeValidator(checked.number)]
_Seconds = Annotated[float, BeforeValidator(checked.number)]


class Settings(BaseSettings):
    """What a guard was told, checked. Made by `load`.

    A field's description completes the sentence "NAME must be ...", which is the error for a value that can't work.

    Attributes:
        storage: Where everything is kept.
        mode: "enforce"; "shadow" decides and reports and refuses nobody; "off" does nothing.
        default_limits: `customer_params` limits of customers without their own, as checked JSON values.
        app_budgets: What all customers together may spend: the budget fields of `customer_params`.
        model_budgets: What all together may spend on each model; counted where a call says its model beforehand.
        hold: "upper_bound" holds what a call could cost at most; "none"; or an amount, USD.
        default_hold: What a request holds whose body says nothing about an LLM call, USD.
        default_max_output_tokens: The longest answer to expect where a request sets no maximum.
        prices: Prices over those of genai-prices, USD per million tokens.
        unknown_price: "reject" refuses calls to models without a price where a budget applies; "flag" lets them pass.
        time_zone: Where days and months begin, for customers without their own.
        namespace: Keeps several guards apart in one store.
        retention: Days to keep records, 40 or more; None for ever. Sums stay.
        storage_timeout: Seconds that storage may take; None for the backend's own default.
        budget_failure: What becomes of customers with budgets while storage gives no answer: "closed" refuses them,
            "open" lets them in, "local" up to a share of what was last known to be left.
        rate_limit_failure: The same for rate limits; "local" is a share of the rate.
        local_share: The share of a limit that "local" gives to each process, from above 0 to 1.
        rate_limit_storage: A storage URL of `limits` that keeps the rates; None for in `storage`, with the rest.
        rate_limit_strategy: How they are counted there.
        hold_ttl: Seconds after which a hold that nobody ended no longer counts.
        budget_status_code: The answer to a spent budget.
        show_amounts: Whether refusals and headers say amounts of money.
        unknown_customers: Whether customers that were never put are admitted.
        trust_customer_params: Whether limits in a request's `customer_params` are obeyed.
        missing_usage: What a call whose reply has no usage is booked as: its "hold", an "estimate", or none ("flag").
        store_content: Whether the text of calls that are reported to the API is kept.
        journal_dir: Where records wait that storage can't take; None for `respan-guard-UID` in the system's temporary
            directory, which containers and some hosts empty.
        max_cached_customers: How many customers' limits are kept in memory.
        clock: Where time comes from.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
    )

    storage: Annotated[str, BeforeValidator(checked.storage)] = Field(
        "sqlite:///respan_guard.db", description='a URL like "sqlite:///guard.db" or "memory://"'
    )
    mode: Mode = Field("enforce", description='"enforce", "shadow" or "off"')
    default_limits: Annotated[dict[str, Any] | None, BeforeValidator(checked.default_limits)] = Field(
        None,
        description='limits of a customer like {"rate_limit": 60, "budget_duration": "monthly", "period_budget": 5}',
    )
    app_budgets: Annotated[dict[str, Any] | None, BeforeValidator(checked.shared_budgets)] = Field(
        None, description='budgets like {"budget_duration": "daily", "period_budget": 500, "total_budget": 10000}'
    )
    model_budgets: Annotated[dict[str, Any] | None, BeforeValidator(checked.shared_budgets)] = Field(
        None, description='budgets like {"budget_duration": "daily", "period_budget": 200}'
    )
    hold: Annotated[Literal["upper_bound", "none"] | Decimal, BeforeValidator(checked.hold)] = Field(
        "upper_bound", description='"upper_bound", "none" or an amount of USD from 0'
    )
    default_hold: Annotated[Decimal, BeforeValidator(checked.money)] = Field(
        Decimal(0), description="an amount of USD from 0"
    )
    default_max_output_tokens: _Count = Field(4096, ge=1, le=10_000_000, description="a number of tokens from 1")
    prices: dict[str, Any] = Field(
        {}, description='prices by model like {"my-model": {"input": 0.5, "output": 1.5}}, USD per million tokens'
    )
    unknown_price: Literal["reject", "flag"] = Field("reject", description='"reject" or "flag"')
    time_zone: Annotated[str, BeforeValidator(checked.zone)] = Field(
        "UTC", description='the name of a time zone like "UTC" or "Europe/Berlin"'
    )
    namespace: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="1 to 64 letters, digits, dots, dashes and underscores",
    )
    retention: Annotated[int | None, BeforeValidator(checked.days)] = Field(
        None,
        ge=checked.LEAST_RETENTION,
        le=100_000,
        description=f'a number of days from {checked.LEAST_RETENTION} like 400 or "400 days"',
    )
    storage_timeout: _Seconds | None = Field(None, gt=0, le=300, description="a number of seconds above 0, at most 300")
    budget_failure: FailureMode = Field("closed", description='"closed", "open" or "local"')
    rate_limit_failure: FailureMode = Field("local", description='"closed", "open" or "local"')
    local_share: _Seconds = Field(0.1, gt=0, le=1, description="a share above 0, at most 1")
    rate_limit_storage: Annotated[str | None, BeforeValidator(checked.rate_storage)] = Field(
        None, description='a storage URL of limits like "redis://localhost:6379" or "memcached://localhost:11211"'
    )
    rate_limit_strategy: RateLimitStrategy = Field(
        "sliding-window-counter", description='"sliding-window-counter", "moving-window" or "fixed-window"'
    )
    hold_ttl: _Seconds = Field(600.0, ge=1, le=86_400, description="a number of seconds from 1 to 86400")
    budget_status_code: _Count = Field(402, ge=400, le=499, description="a status from 400 to 499, like 402 or 429")
    show_amounts: bool = Field(False, description="true or false")
    unknown_customers: Literal["admit", "refuse"] = Field("admit", description='"admit" or "refuse"')
    trust_customer_params: bool = Field(False, description="true or false")
    missing_usage: Literal["hold", "estimate", "flag"] = Field("hold", description='"hold", "estimate" or "flag"')
    store_content: bool = Field(False, description="true or false")
    journal_dir: Path | None = Field(None, description="the path of a directory")
    max_cached_customers: _Count = Field(10_000, ge=1, le=100_000_000, description="a number from 1")
    clock: Clock = Field(default_factory=SystemClock, description="an object with now_ms() and monotonic()")

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: Any, *_: Any, **__: Any
    ) -> tuple[Any, ...]:
        """Take only what is passed: `load` has read the sources, each option from exactly one of them."""
        return (init_settings,)

    @classmethod
    def load(cls, **options: Any) -> Self:
        """Read the settings. `storage=None` is the same as leaving it out.

        Raises:
            ConfigurationError: A name is unknown, a value can't work, or the file can't be read.
        """
        if options.get("storage", "") is None:
            del options["storage"]
        known = list(cls.model_fields)
        for name in options:
            if name not in known:
                raise ConfigurationError(f"{name} is no option of Guard; {nearest(name, known)}")
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        file, from_file = cls._from_file()
        for name, value in from_file.items():
            values[name], sources[name] = value, file
        for name, value in cls._from_environment().items():
            values[name], sources[name] = value, f"environment {_PREFIX}{name.upper()}"
        for name, value in options.items():
            values[name], sources[name] = value, "keyword"
        try:
            settings = cls(**values)
        except ValidationError as error:
            raise ConfigurationError(_explain(error, values, sources)) from None
        settings._sources.update(sources)
        return settings

    def sources(self) -> dict[str, tuple[Any, str]]:
        """Every option's value, secrets masked, and where it is from.

        The source is "keyword", "environment RESPAN_GUARD_NAME", the file's name or "default".
        """
        return {
            name: (_masked(name, getattr(self, name)), self._sources.get(name, "default"))
            for name in type(self).model_fields
        }

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [(name, _masked(name, getattr(self, name))) for name in type(self).model_fields]

    @classmethod
    def _from_environment(cls) -> dict[str, Any]:
        known = {_PREFIX + name.upper(): name for name in cls.model_fields}
        for variable, text in os.environ.items():
            upper = variable.upper()
            if not upper.startswith(_PREFIX) or upper.startswith(_TEST_PREFIX) or upper == CONFIG_VARIABLE:
                continue
            if _OF_A_SERVICE.fullmatch(variable):
                continue
            if upper not in known:
                raise ConfigurationError(
                    f"environment variable {variable} is no setting; {nearest(upper, [*known, CONFIG_VARIABLE])}"
                )
            if known[upper] in _KEYWORD_ONLY:
                raise ConfigurationError(f"{variable} can't be set in the environment; pass {known[upper]}= to Guard")
            if not text.strip():
                raise ConfigurationError(f"environment variable {variable} is empty; give it a value or unset it")
        try:
            return EnvSettingsSource(cls)()
        except SettingsError as error:
            cause = error.__cause__
            where = f": {cause}" if isinstance(cause, json.JSONDecodeError) else ""
            name = next(name for name in cls.model_fields if f'"{name}"' in str(error))
            raise ConfigurationError(
                f"environment variable {_PREFIX}{name.upper()} must be {_expected(name)}, as JSON{where}"
            ) from None

    @classmethod
    def _from_file(cls) -> tuple[str, dict[str, Any]]:
        named = os.environ.get(CONFIG_VARIABLE)
        path = Path(named or CONFIG_FILE)
        if not named and not path.exists():
            return CONFIG_FILE, {}
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(f"settings file {path} can't be read: {error.strerror}") from None
        except ValueError as error:  # what is no TOML, and what is no UTF-8
            raise ConfigurationError(f"settings file {path} is no TOML: {error}") from None
        known = [name for name in cls.model_fields if name not in _KEYWORD_ONLY]
        for name in found:
            if name in _KEYWORD_ONLY:
                raise ConfigurationError(f"{name} can't be set in {path}; pass {name}= to Guard")
            if name not in known:
                raise ConfigurationError(f"{name} in {path} is no setting; {nearest(name, known)}")
        return str(path), found


def _masked(name: str, value: Any) -> Any:
    if not name.endswith("storage") or value is None:
        return value
    return mask_url(value) if isinstance(value, str) else UNSHOWN


def _expected(name: str) -> str:
    return Settings.model_fields[name].description or ""


def _explain(error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_input=False):
        name = str(problem["loc"][0])
        if name in lines:  # a union reports each of its members
            continue
        why = problem.get("ctx", {}).get("error")
        reason = f": {why}" if isinstance(why, ValueError) else ""
        got = reprlib.repr(_masked(name, values.get(name)))
        lines[name] = f"{name} must be {_expected(name)}, got {got}{reason} ({sources.get(name, 'default')})"
    return "; ".join(lines.values())
