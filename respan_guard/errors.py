"""What can go wrong, and what each error means.

GuardError
├── ConfigurationError(ValueError)     the app is set up wrongly: option, URL, extra, middleware order
│   └── MissingExtra(ImportError)      a package is not installed that a part of the library needs
├── InvalidInput(ValueError)           a value is unusable: id, money, date, body; nothing was written
│   ├── InvalidIdentifier              a customer id that breaks the rules of ids
│   ├── BodyTooLarge                   a request body that must be read is beyond the cap
│   └── UnpricedModel                  a model without a price, where a budget applies
├── Unidentified                       a guarded path was reached by nobody we know
├── CustomerUnknown(LookupError)       no such customer
├── RevisionConflict                   someone else changed the customer first
├── BackendError                       storage answered, but not with what we need
│   ├── StorageUnavailable             no answer in time; whether it was applied is unknown
│   ├── StorageReadOnly                storage can be read but not written
│   ├── StorageFull                    no space left
│   ├── StorageCorrupt                 the file or table is damaged
│   ├── SchemaMismatch                 written by a newer version of respan_guard
│   ├── StoreReset                     the store is not the one that was opened: it was wiped or replaced
│   └── CounterOverflow                a sum would leave the range that every backend keeps exactly
└── LimitExceeded                      the answer is no; carries the decision
    ├── RateLimitExceeded
    ├── BudgetExceeded
    └── CustomerBlocked
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from respan_guard.decision import Decision

__all__ = [
    "BackendError",
    "BodyTooLarge",
    "BudgetExceeded",
    "ConfigurationError",
    "CounterOverflow",
    "CustomerBlocked",
    "CustomerUnknown",
    "GuardError",
    "InvalidIdentifier",
    "InvalidInput",
    "LimitExceeded",
    "MissingExtra",
    "RateLimitExceeded",
    "RevisionConflict",
    "SchemaMismatch",
    "StorageCorrupt",
    "StorageFull",
    "StorageReadOnly",
    "StorageUnavailable",
    "StoreReset",
    "Unidentified",
    "UnpricedModel",
]


class GuardError(Exception):
    """Base of every error that respan_guard raises."""


class ConfigurationError(GuardError, ValueError):
    """The app is set up wrongly; the message says what would be right."""


class MissingExtra(ConfigurationError, ImportError):
    """A part of the library needs a package that is not installed."""


class InvalidInput(GuardError, ValueError):
    """A value is unusable. Nothing was written.

    Args:
        message: What was wrong and what would be right.
        field: The name of the offending field, where there is one.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class InvalidIdentifier(InvalidInput):
    """A customer identifier that breaks the rules of identifiers."""


class BodyTooLarge(InvalidInput):
    """A request body that has to be read is larger than the middleware's `max_body_bytes`."""


class UnpricedModel(InvalidInput):
    """A model has no known price, and a budget applies to the customer."""


class Unidentified(GuardError):
    """A guarded path was reached without a customer."""


class CustomerUnknown(GuardError, LookupError):
    """There is no such customer."""


class RevisionConflict(GuardError):
    """Someone else changed the customer since it was read."""


class BackendError(GuardError):
    """Storage answered, but not with what the contract asks for."""


class StorageUnavailable(BackendError):
    """Storage gave no answer in time. Whether the operation was applied is unknown."""


class StorageReadOnly(BackendError):
    """Storage can be read but not written."""


class StorageFull(BackendError):
    """Storage has no space left."""


class StorageCorrupt(BackendError):
    """The file or table is damaged, or is no store of respan_guard."""


class SchemaMismatch(BackendError):
    """The store was written by a newer version of respan_guard."""


class StoreReset(BackendError):
    """The store is not the one that was opened. A wiped store is not zero spend."""


class CounterOverflow(BackendError):
    """A sum would leave the range in which every backend counts exactly. Nothing was applied."""


class LimitExceeded(GuardError):
    """A customer is over a limit.

    Attributes:
        decision: The whole decision, every limit with what is used, held and left.
        retry_after: Seconds until asking again makes sense; None if time alone won't help soon.
    """

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision.detail)
        self.decision = decision

    @property
    def retry_after(self) -> float | None:
        """Seconds until asking again makes sense, or None."""
        return self.decision.retry_after


class RateLimitExceeded(LimitExceeded):
    """Too many requests in the window."""


class BudgetExceeded(LimitExceeded):
    """The budget is spent, or full because of calls in flight (`decision.transient`)."""


class CustomerBlocked(LimitExceeded):
    """The customer was blocked by hand."""
