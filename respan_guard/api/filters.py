"""Respan's filters: `{"field": {"operator": "gte", "value": [1]}}`, all of which must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Generic, TypeVar

from respan_guard.api.fields import clean_text
from respan_guard.errors import InvalidInput
from respan_guard.identifiers import shown

__all__ = ["OPERATORS", "Condition", "Filters", "read_filters"]

R = TypeVar("R")
MAX_CONDITIONS: Final = 50
MAX_VALUES: Final = 1_000
MAX_VALUE: Final = 10_000
METADATA: Final = "metadata__"

_ANY_OF = ("", "in", "not", "not_in")
_ORDER: Mapping[str, Callable[[Any, Any], bool]] = {
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
}
_TEXT: Mapping[str, Callable[[str, str], bool]] = {
    "contains": lambda a, b: b in a,
    "icontains": lambda a, b: b.casefold() in a.casefold(),
    "startswith": str.startswith,
    "endswith": str.endswith,
}
OPERATORS: Final = (*_ANY_OF, *_ORDER, *_TEXT, "not_contains", "not_startswith", "not_endswith", "empty", "not_empty")


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition on one field. `values` are of the field's kind."""

    field: str
    operator: str
    values: tuple[Any, ...]

    @property
    def only(self) -> Any:
        """The one value it lets through; None if it does not say one."""
        return self.values[0] if self.operator in ("", "in") and len(self.values) == 1 else None

    def holds(self, value: Any) -> bool:
        """Whether it holds for a row's value; None and "" are empty."""
        operator = self.operator
        empty = value is None or value == ""
        if operator in ("empty", "not_empty"):
            return empty == (operator == "empty")
        if operator in ("", "in"):
            return value in self.values
        if operator in ("not", "not_in"):
            return value not in self.values
        if operator in _ORDER:
            return value is not None and _ORDER[operator](value, self.values[0])
        wanted = not operator.startswith("not_")
        return _TEXT[operator.removeprefix("not_")](value or "", self.values[0]) == wanted


class Filters(Generic[R]):
    """Conditions on rows of one kind.

    Args:
        conditions: All must hold.
        get: The value of a row's field.
    """

    def __init__(self, conditions: Sequence[Condition], get: Callable[[R, str], Any]) -> None:
        self.conditions = conditions
        self._get = get

    def __call__(self, row: R) -> bool:
        """Whether all hold for a row."""
        return all(self._holds(condition, row) for condition in self.conditions)

    def _holds(self, condition: Condition, row: R) -> bool:
        value = self._get(row, condition.field)
        if value is None and condition.field.startswith(METADATA):
            return condition.operator == "empty"  # a row without the key never matches, not even "not"
        return condition.holds(value)

    def only(self, field: str) -> Any:
        """The one value of a field that these let through; None if they do not say one."""
        return next((c.only for c in self.conditions if c.field == field and c.only is not None), None)

    def shown(self) -> dict[str, list[dict[str, Any]]]:
        """They themselves, as they were understood."""
        found: dict[str, list[dict[str, Any]]] = {}
        for condition in self.conditions:
            values = list(condition.values)
            found.setdefault(condition.field, []).append({"operator": condition.operator, "value": values})
        return found

    def fields(self) -> set[str]:
        """What they are about."""
        return {condition.field for condition in self.conditions}


def read_filters(
    given: Mapping[str, Any],
    kinds: Mapping[str, str],
    get: Callable[[R, str], Any],
    aliases: Mapping[str, str],
    *,
    metadata: bool = False,
) -> Filters[R]:
    """Check foreign filters.

    Args:
        given: By field, a condition or a list of them.
        kinds: What each field holds: "text", "number" or "flag".
        get: The value of a row's field.
        aliases: Other names of fields.
        metadata: Whether `metadata__KEY` is a field.

    Raises:
        InvalidInput: A field, an operator or a value is not known here.
    """
    found: list[Condition] = []
    for name, conditions in given.items():
        field = aliases.get(name, name)
        kind = kinds.get(field)
        if kind is None and metadata and field.startswith(METADATA) and len(field) > len(METADATA):
            kind = "text"
        if kind is None:
            known = ", ".join([*kinds, f"{METADATA}KEY"] if metadata else kinds)
            raise InvalidInput(f"can't filter by {shown(name)}; known: {known}", field="filters")
        listed = conditions if isinstance(conditions, list) else [conditions]
        found += [_condition(field, kind, condition) for condition in listed if condition is not None]
        if len(found) > MAX_CONDITIONS:
            raise InvalidInput(f"filters must hold at most {MAX_CONDITIONS} conditions", field="filters")
    return Filters(found, get)


def _condition(field: str, kind: str, condition: Any) -> Condition:
    if not isinstance(condition, Mapping):
        raise InvalidInput(
            f'filters.{field} must be like {{"operator": "", "value": [...]}}, got {shown(condition)}', field="filters"
        )
    operator = condition.get("operator") or ""
    if not isinstance(operator, str) or operator not in OPERATORS:
        known = ", ".join(repr(name) for name in OPERATORS)
        raise InvalidInput(f"filters.{field}.operator must be one of {known}, got {shown(operator)}", field="filters")
    if (operator in _ORDER and kind != "number") or (operator.removeprefix("not_") in _TEXT and kind != "text"):
        raise InvalidInput(f"filters.{field} holds a {kind}, which has no {operator!r}", field="filters")
    if operator in ("empty", "not_empty"):
        return Condition(field, operator, ())
    values = condition.get("value")
    values = values if isinstance(values, list) else [values]
    if not 1 <= len(values) <= (MAX_VALUES if operator in _ANY_OF else 1):
        many = f"1 to {MAX_VALUES:,} values" if operator in _ANY_OF else "one value"
        raise InvalidInput(f"filters.{field}.value must hold {many}, got {len(values):,}", field="filters")
    return Condition(field, operator, tuple(_value(field, kind, value) for value in values))


def _value(field: str, kind: str, value: Any) -> Any:
    if kind == "text" and isinstance(value, (str, int)) and not isinstance(value, bool):
        if len(text := str(value)) <= MAX_VALUE and text == clean_text(text):  # else no row can have it
            return text
    elif kind == "number" and not isinstance(value, bool):
        if isinstance(value, (int, Decimal)) or (isinstance(value, str) and len(value) <= 40):
            try:
                number = Decimal(value)
            except ArithmeticError:
                number = Decimal("NaN")
            if number.is_finite() and abs(number.adjusted()) < 40:
                return number
    elif kind == "flag" and (isinstance(value, bool) or value in ("true", "false")):
        return value in (True, "true")
    raise InvalidInput(f"filters.{field}.value must hold a {kind}, got {shown(value)}", field="filters")
