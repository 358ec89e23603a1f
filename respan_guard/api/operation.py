"""What an operation of the API is: one table says where it is, who may do it, what it takes and what it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from respan_guard.errors import InvalidInput

if TYPE_CHECKING:
    from respan_guard.api.pages import Pages
    from respan_guard.guard import Guard

__all__ = ["Call", "NoQuery", "Operation", "validated"]

M = TypeVar("M", bound=BaseModel)


class NoQuery(BaseModel):
    """Query parameters: none."""

    model_config = ConfigDict(extra="forbid")


@dataclass(slots=True)
class Call:
    """One call of an operation.

    Attributes:
        query: An instance of the operation's `query`.
        body: The JSON body, not yet looked at; None if there is none.
    """

    guard: Guard
    pages: Pages
    request: Request
    query: Any
    body: Any

    def path(self, name: str) -> str:
        """A part of the path, decoded."""
        return str(self.request.path_params[name])


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation.

    Attributes:
        name: The OpenAPI operationId.
        writes: Whether it needs a key that may write.
        takes: What its body is, for the document; None for no body.
        optional: Whether the body may be left out.
        answers: Status to the model of the body; None for no body.
    """

    name: str
    method: str
    path: str
    handler: Callable[[Call], Awaitable[Response]]
    summary: str
    tag: str
    answers: Mapping[int, type[BaseModel] | None]
    writes: bool = False
    query: type[BaseModel] = NoQuery
    takes: type[BaseModel] | None = None
    optional: bool = False
    errors: tuple[int, ...] = field(default=(400,))


def validated(model: type[M], value: object) -> M:
    """Check foreign data.

    Raises:
        InvalidInput: With the first thing that is wrong, and where.
    """
    if not isinstance(value, Mapping):
        raise InvalidInput("the body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        cause = first.get("ctx", {}).get("error")
        reason = str(cause) if isinstance(cause, InvalidInput) else _said(first["type"], first["msg"])
        raise InvalidInput(f"{where}: {reason}" if where else reason, field=where or None) from None


def _said(kind: str, message: str) -> str:
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not known here"
    return message[:1].lower() + message[1:]
