"""Who the customer is: the sources that `identify` can name, asked in order until one knows.

`"user"`, `"state:NAME"` and callables are the server's word. `"header:NAME"`, `"respan-params"`, `"body"`,
`"openai-user"` and `"anthropic-user"` are the client's word: for callers that are trusted.
"""

from __future__ import annotations

import base64
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from starlette.requests import HTTPConnection

from respan_guard.customer import Customer
from respan_guard.errors import ConfigurationError, InvalidInput
from respan_guard.identifiers import check_identifier
from respan_guard.middleware.headers import header
from respan_guard.settings import nearest

__all__ = ["Identified", "Identify", "Source", "describe", "sources"]

IdentifyCallable: TypeAlias = Callable[
    [HTTPConnection], "str | int | Customer | Awaitable[str | int | Customer | None] | None"
]
Identify: TypeAlias = str | IdentifyCallable | Sequence[str | IdentifyCallable]

_NAMES: Final = ("user", "state:NAME", "header:NAME", "respan-params", "body", "openai-user", "anthropic-user")
_HEADERS: Final = (b"x-data-respan-params", b"x-data-keywordsai-params")
_CONTAINERS: Final = ("respan_params", "keywordsai_params")
_FIELDS: Final = ("customer_identifier", "customer_params")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MAX_PARAMS = 65_536

Scope = MutableMapping[str, Any]
Body = Mapping[str, Any]


class Identified(NamedTuple):
    """An answer: who, and the `customer_params` that came along."""

    customer: Any
    params: Mapping[str, Any] | None = None


class Source(Protocol):
    """One place to look.

    Attributes:
        names: Names in the JSON body that it reads; empty if it needs no body.
    """

    names: tuple[str, ...]

    def find(self, scope: Scope, body: Body) -> Identified | Awaitable[Identified | None] | None:
        """Say who it is, or None. `body` is empty where it was not read."""
        ...


def sources(identify: Identify) -> tuple[Source, ...]:
    """Turn what was given as `identify` into sources.

    Raises:
        ConfigurationError: A name is unknown, or it is neither a name nor a callable.
    """
    given: Any = [identify] if isinstance(identify, str) or callable(identify) else identify
    if not isinstance(given, Sequence) or not given:
        raise ConfigurationError(f"identify must be a source or a list of sources, got {identify!r}; {_known()}")
    found: list[Source] = []
    params: _RespanParams | None = None
    for one in given:
        if one in ("respan-params", "body"):
            if params is None:
                found.append(params := _RespanParams())
            # Together they are one source, at the place of the first: Respan's precedence is field by field.
            params.add(one)
        else:
            found.append(_source(one))
    return tuple(found)


def describe(identify: Identify) -> str:
    """The sources by name, for people."""
    given = [identify] if isinstance(identify, str) or callable(identify) else identify
    return ", ".join(one if isinstance(one, str) else _name(one) for one in given)


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _source(one: str | IdentifyCallable) -> Source:
    if callable(one):
        return _Callable(one)
    if isinstance(one, str):
        kind, _, name = one.partition(":")
        if one == "user":
            return _User()
        if one == "openai-user":
            return _OpenAIUser()
        if one == "anthropic-user":
            return _AnthropicUser()
        if kind == "state" and name.isidentifier():
            return _State(name)
        if kind == "header" and _TOKEN.fullmatch(name):
            return _Header(name)
    raise ConfigurationError(f"{one!r} is no source of a customer; {_known(one)}")


def _known(one: object = "") -> str:
    return f"{nearest(str(one), list(_NAMES))}; or a callable that takes an HTTPConnection"


class _User:
    names: tuple[str, ...] = ()

    def find(self, scope: Scope, body: Body) -> Identified | None:
        if "user" not in scope:
            raise ConfigurationError(
                'identify="user" found no user in the request: AuthenticationMiddleware must run before the guard. '
                "Add it after GuardMiddleware (what is added last runs first): "
                "app.add_middleware(GuardMiddleware, ...), then app.add_middleware(AuthenticationMiddleware, ...)"
            )
        user = scope["user"]
        if user is None or not getattr(user, "is_authenticated", True):
            return None
        try:
            identity = user.identity
        except (AttributeError, NotImplementedError):
            raise ConfigurationError(
                f'identify="user" needs a user with an `identity`; {type(user).__name__} has none. '
                "Add the property, or pass a callable"
            ) from None
        return _identified(identity)


class _State:
    names: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self._name = name

    def find(self, scope: Scope, body: Body) -> Identified | None:
        return _identified(scope.get("state", {}).get(self._name))


class _Header:
    names: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self._name = name.lower().encode("ascii")

    def find(self, scope: Scope, body: Body) -> Identified | None:
        value = header(scope["headers"], self._name)
        if value is None:
            return None
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = value.decode("latin-1")  # what HTTP/1 says, and some clients still send
        return _identified(text.strip(" \t"))


class _Callable:
    names: tuple[str, ...] = ()

    def __init__(self, function: IdentifyCallable) -> None:
        self._function = function

    def find(self, scope: Scope, body: Body) -> Identified | Awaitable[Identified | None] | None:
        answer = self._function(HTTPConnection(scope))
        return self._wait(answer) if inspect.isawaitable(answer) else self._checked(answer)

    async def _wait(self, answer: Awaitable[object]) -> Identified | None:
        return self._checked(await answer)

    def _checked(self, answer: object) -> Identified | None:
        if answer is None or isinstance(answer, (str, Customer)) or answer.__class__ is int:
            return _identified(answer)
        raise ConfigurationError(
            f"{_name(self._function)}, given as identify, must return a str, a Customer or None, "
            f"got {type(answer).__name__}"
        )


class _OpenAIUser:
    names: tuple[str, ...] = ("user", "safety_identifier")

    def find(self, scope: Scope, body: Body) -> Identified | None:
        return _end_user(body, "safety_identifier") or _end_user(body, "user")


class _AnthropicUser:
    names: tuple[str, ...] = ("metadata", "user_id")

    def find(self, scope: Scope, body: Body) -> Identified | None:
        metadata = body.get("metadata")
        return _end_user(metadata, "user_id") if isinstance(metadata, Mapping) else None


class _RespanParams:
    """`customer_params` and `customer_identifier`, by Respan's precedence.

    The body's `respan_params` go before the header, the header before the body's own fields; within each, the
    identifier in `customer_params` goes before the one beside them. The first that names a customer decides; what else
    `customer_params` say may stand elsewhere, if nobody else is named there.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._header = False

    def add(self, name: str) -> None:
        if name == "body":
            self.names = (*_CONTAINERS, *_FIELDS)
        else:
            self._header = True

    def find(self, scope: Scope, body: Body) -> Identified | None:
        places: list[Mapping[str, Any]] = []
        if self.names:
            places.extend(_object(body.get(name), name) for name in _CONTAINERS)
        if self._header:
            places.append(_from_header(scope))
        if self.names:
            places.append(body)
        said = [_said(place) for place in places]
        identifier = next((named for named, _ in said if named is not None), None)
        if identifier is None:
            return None
        params = next((params for named, params in said if params and named in (None, identifier)), None)
        return Identified(identifier, params)


def _said(place: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Whom one place names, and what else it says of that customer."""
    params = place.get("customer_params")
    if params is not None and not isinstance(params, Mapping):
        raise InvalidInput("customer_params must be a JSON object", field="customer_params")
    params = dict(params or {})
    identifier = params.pop("customer_identifier", None)
    return place.get("customer_identifier") if identifier is None else identifier, params


def _end_user(fields: Mapping[str, Any], name: str) -> Identified | None:
    value = fields.get(name)
    return None if value is None or value == "" else Identified(check_identifier(value, name))


def _identified(value: object) -> Identified | None:
    if value is None or value == "":
        return None
    return Identified(value if isinstance(value, (str, int, Customer)) else str(value))


def _object(value: object, name: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        if len(value) > _MAX_PARAMS:  # text within a body is not weighed
            raise InvalidInput(f"{name} must be at most {_MAX_PARAMS:,} characters", field=name)
        value = _loads(value, name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{name} must be a JSON object", field=name)
    return value


def _from_header(scope: Scope) -> Mapping[str, Any]:
    found: dict[str, Any] | None = None
    for name in _HEADERS:
        value = header(scope["headers"], name)
        if value is not None:
            if found is not None:
                raise InvalidInput(f"the header {name.decode()} says again what another one says", field=name.decode())
            found = dict(_object(_plain(value.strip(), name.decode()), name.decode()))
    return found or {}


def _plain(value: bytes, name: str) -> str:
    """The JSON of a params header: base64, as Respan's clients send it, or as it is, as its batch pages show it."""
    if len(value) <= _MAX_PARAMS:
        try:
            if not value.startswith(b"{"):
                padded = value + b"=" * (-len(value) % 4)
                value = base64.b64decode(padded.translate(_URL_SAFE), validate=True)
            return value.decode()
        except ValueError:
            pass
    raise InvalidInput(f"the header {name} must be a JSON object in base64", field=name)


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def _loads(text: str, name: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_repeats)
    except InvalidInput:
        raise
    except (ValueError, RecursionError):
        raise InvalidInput(f"{name} must be a JSON object", field=name) from None


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidInput("a name is given twice; say it once", field="customer_params")
    return found
