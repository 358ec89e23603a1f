"""Customers: their identifiers, and the fields that `customer_params` has for them.

Everything foreign is checked here, once: whatever `Customer` accepts, the rest of the package may rely
on. `Customer.to_params` is the form that is stored, equal for equal meanings.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from respan_guard.errors import InvalidInput
from respan_guard.identifiers import check_identifier, normalise_identifier, shown
from respan_guard.money import NANO, from_nano, to_nano
from respan_guard.periods import DURATIONS, Duration, load_zone, period
from respan_guard.rates import canonical_rate

__all__ = ["MAX_METADATA_BYTES", "Customer", "normalise_identifier"]

MAX_METADATA_BYTES: Final = 16_384

_MAX_TEXT = 1_000
_MAX_PERCENTAGE = 1_000_000
_FIRST_YEAR, _LAST_YEAR = 1900, 2999  # any period counted from these is within Python's calendar
_ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def _money(field: str) -> BeforeValidator:
    def check(value: object) -> Decimal | None:
        return None if value is None else from_nano(_bounded_nano(value, field, "an amount of USD", 9_000_000))

    return BeforeValidator(check)


def _bounded_nano(value: object, field: str, what: str, most: int) -> int:
    wrong = f"{field} must be {what} from 0 to {most:,}, got {shown(value)}"
    if isinstance(value, bool) or not isinstance(value, (Decimal, int, float, str)):
        raise InvalidInput(wrong, field=field)
    if (isinstance(value, str) and len(value) > 64) or (isinstance(value, int) and value.bit_length() > 64):
        raise InvalidInput(wrong, field=field)
    try:
        nano = to_nano(value, field)
    except InvalidInput:
        nano = -1
    if not 0 <= nano <= most * NANO:
        raise InvalidInput(wrong, field=field)
    if not nano and Decimal(str(value)):
        raise InvalidInput(f"{field} must be 0 or at least 0.000000001, got {shown(value)}", field=field)
    return nano


def _percentage(value: object) -> Decimal | None:
    if value is None:
        return None
    return from_nano(_bounded_nano(value, "markup_percentage", "a percentage, 20 for 20 %,", _MAX_PERCENTAGE))


def _date(field: str) -> BeforeValidator:
    def check(value: object) -> date | None:
        if value is None:
            return None
        found = None
        if isinstance(value, str) and _ISO_DATE.fullmatch(value):
            with suppress(ValueError):  # 30 February
                found = date.fromisoformat(value)
        elif isinstance(value, date) and not isinstance(value, datetime):
            found = value
        if found is None:
            wrong = f"{field} must be a date like '2026-01-31' (YYYY-MM-DD), got {shown(value)}"
            raise InvalidInput(wrong, field=field)
        if not _FIRST_YEAR <= found.year <= _LAST_YEAR:
            wrong = f"{field} must be in the years {_FIRST_YEAR} to {_LAST_YEAR}, got {found}"
            raise InvalidInput(f"{wrong}; a budget without end is a total_budget", field=field)
        return found

    return BeforeValidator(check)


def _text(field: str) -> BeforeValidator:
    def check(value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            raise InvalidInput(f"{field} must be a string, got {shown(value)}", field=field)
        if len(value) > _MAX_TEXT:
            raise InvalidInput(f"{field} must be at most {_MAX_TEXT:,} characters", field=field)
        bad = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs")), None)
        if bad is not None:
            raise InvalidInput(f"{field} must not contain control or surrogate characters", field=field)
        return str.__str__(value)

    return BeforeValidator(check)


def _group(value: object) -> str | None:
    return None if value is None else check_identifier(value, "group_identifier")


def _metadata(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidInput(f"metadata must be a JSON object, got {shown(value)}", field="metadata")
    try:
        text = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())  # fails on surrogates, which stores can't keep
    except (TypeError, ValueError, RecursionError):
        raise InvalidInput(
            "metadata must hold nothing but JSON: strings, finite numbers, booleans, null, lists, objects",
            field="metadata",
        ) from None
    if size > MAX_METADATA_BYTES:
        raise InvalidInput(
            f"metadata must be at most {MAX_METADATA_BYTES:,} bytes of JSON, got {size:,}", field="metadata"
        )
    if "\\u0000" in text:
        raise InvalidInput("metadata must not contain the character U+0000", field="metadata")
    found: dict[str, Any] = json.loads(text)
    return found


def _rate(value: object) -> int | str | None:
    return None if value is None else canonical_rate(value)


def _duration(value: object) -> Duration | None:
    if value is None:
        return None
    found = next((name for name in DURATIONS if name == value), None)
    if found is None:
        known = ", ".join(DURATIONS)
        raise InvalidInput(f"budget_duration must be one of {known}, got {shown(value)}", field="budget_duration")
    return found


def _blocked(value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidInput(f"blocked must be true or false, got {shown(value)}", field="blocked")
    return value


def _zone(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidInput(
            f"time_zone must be an IANA name like 'Europe/Berlin', got {shown(value)}", field="time_zone"
        )
    load_zone(value)
    return value


_Identifier: TypeAlias = Annotated[str, BeforeValidator(normalise_identifier)]


class Customer(BaseModel):
    """Whom the work is done for, and what may be spent on it: Respan's `customer_params`, and more.

    Attributes:
        customer_identifier: The key, see `normalise_identifier`.
        name: For people.
        email: For people; not checked to be one.
        metadata: Any JSON object up to 16 KB.
        group_identifier: The group that reports count the customer to.
        rate_limit: Requests per minute (an int), or rates like "100/minute; 2000/hour".
        budget_duration: How long a budget's period is; "monthly" where only a budget is given.
        period_budget: USD for each period; 0 means that nothing may be spent.
        total_budget: USD for all time.
        period_start: First day of a period, from which all are counted; the day the budget was set if omitted.
        period_end: The day after the last day. Without `budget_duration`, period after period is as long.
        markup_percentage: What reports add to costs; limits count without it.
        blocked: Refuse everything.
        time_zone: Where the customer's days begin (IANA name); the guard's if omitted.
        period_anchor: What reads say beside the current period: the `period_start` all periods are counted from.
            Written back with the period that was read, it stands for no change; otherwise it says nothing.

    Raises:
        InvalidInput: A field is unusable or unknown, or the fields contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    customer_identifier: _Identifier
    name: Annotated[str | None, _text("name")] = None
    email: Annotated[str | None, _text("email")] = None
    metadata: Annotated[dict[str, Any] | None, BeforeValidator(_metadata)] = None
    group_identifier: Annotated[str | None, BeforeValidator(_group)] = None
    rate_limit: Annotated[int | str | None, BeforeValidator(_rate)] = None
    budget_duration: Annotated[Duration | None, BeforeValidator(_duration)] = None
    period_budget: Annotated[Decimal | None, _money("period_budget")] = None
    total_budget: Annotated[Decimal | None, _money("total_budget")] = None
    period_start: Annotated[date | None, _date("period_start")] = None
    period_end: Annotated[date | None, _date("period_end")] = None
    markup_percentage: Annotated[Decimal | None, BeforeValidator(_percentage)] = None
    blocked: Annotated[bool, BeforeValidator(_blocked)] = False
    time_zone: Annotated[str | None, BeforeValidator(_zone)] = None
    period_anchor: Annotated[date | None, _date("period_anchor")] = None

    if TYPE_CHECKING:  # what may be given is wider than what is kept

        def __init__(
            self,
            *,
            customer_identifier: str | int,
            name: str | None = None,
            email: str | None = None,
            metadata: Mapping[str, Any] | None = None,
            group_identifier: str | int | None = None,
            rate_limit: int | str | None = None,
            budget_duration: Duration | None = None,
            period_budget: Decimal | float | str | None = None,
            total_budget: Decimal | float | str | None = None,
            period_start: date | str | None = None,
            period_end: date | str | None = None,
            markup_percentage: Decimal | float | str | None = None,
            blocked: bool = False,
            time_zone: str | None = None,
            period_anchor: date | str | None = None,
        ) -> None: ...

    else:

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise _readable(error) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Check foreign data, as pydantic does, but raise `InvalidInput`."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _readable(error) from None

    @model_validator(mode="after")
    def _periods_agree(self) -> Self:
        start, end = self.period_start, self.period_end
        if end is None:
            return self
        if start is None:
            raise InvalidInput("period_end needs a period_start; give both", field="period_end")
        if end <= start:
            raise InvalidInput(f"period_end {end} must be after period_start {start}", field="period_end")
        if self.budget_duration is not None and not self._shown_by_read:
            right = date.fromordinal(period(start, self.budget_duration, start.toordinal())[1])
            if end != right:
                raise InvalidInput(
                    f"period_end {end} contradicts period_start {start} and budget_duration {self.budget_duration},"
                    f" which end on {right}; leave out period_end or budget_duration",
                    field="period_end",
                )
        return self

    @property
    def _shown_by_read(self) -> bool:
        """Whether start and end are a period counted from `period_anchor`, hence what a read said, not a wish."""
        start, end, anchor = self.period_start, self.period_end, self.period_anchor
        if start is None or end is None or anchor is None or end <= start:
            return False
        bounds = start.toordinal(), end.toordinal()
        lengths: list[Duration | int] = [(end - start).days]
        if self.budget_duration is not None:  # any, because it may be what was changed since the read
            lengths += DURATIONS
        return any(period(anchor, length, bounds[0]) == bounds for length in lengths)

    @property
    def anchor(self) -> date | None:
        """The day that periods are counted from: what `period_start` was set to, in what a read said too."""
        return self.period_anchor if self._shown_by_read else self.period_start

    def to_params(self) -> dict[str, Any]:
        """What to store: the fields that are set as JSON values, without the identifier.

        Equal for customers of equal meaning: money is a decimal string, a date is "YYYY-MM-DD", `period_start` is
        the day all periods are counted from, a `period_end` that follows from the duration is left out.

        Raises:
            InvalidInput: The customer is a copy made by `model_copy` with unusable values.
        """
        return type(self)(**self.__dict__)._params()  # model_copy(update=...) checks nothing

    def _params(self) -> dict[str, Any]:
        anchor, start, end = self.anchor, self.period_start, self.period_end
        derived: dict[str, Any] = {"period_start": anchor, "period_end": None}
        if anchor and start and end and self.budget_duration is None:
            derived["period_end"] = anchor + (end - start)
        found: dict[str, Any] = {}
        for name in _PARAMS:
            value = derived[name] if name in derived else getattr(self, name)
            if value is None or value is False or value == {}:
                continue
            if isinstance(value, Decimal):
                value = format(value, "f")
            elif isinstance(value, date):
                value = value.isoformat()
            found[name] = value
        return found

    @classmethod
    def canonical(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        """Params as `to_params` writes them.

        Raises:
            InvalidInput: As the constructor.
        """
        return cls.from_params("customer", params)._params()

    @classmethod
    def from_params(cls, identifier: object, params: Mapping[str, Any] | None) -> Self:
        """Check `customer_params`, or read back what `to_params` wrote.

        Raises:
            InvalidInput: As the constructor.
        """
        fields = {str(name): value for name, value in (params or {}).items()}
        fields["customer_identifier"] = identifier
        return cls(**fields)


_PARAMS = tuple(name for name in Customer.model_fields if name not in ("customer_identifier", "period_anchor"))


def _readable(error: ValidationError) -> InvalidInput:
    """The first thing that pydantic found wrong, as one sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidInput):
        return cause
    field = ".".join(str(part) for part in first["loc"])[:80]
    if first["type"] == "extra_forbidden":
        return InvalidInput(
            f"a customer has no field {field!r}; the fields are customer_identifier, {', '.join(_PARAMS)}", field=field
        )
    if first["type"] == "missing":
        return InvalidInput(f"{field} is missing", field=field)
    return InvalidInput(f"{field}: {first['msg']}", field=field)
