"""Pages that stay where they are while rows come in: `next` carries the place it goes on from.

The official client asks for page 2, 3, ... by number alone. So the places at which pages ended are
remembered for a while; where one is not, what lies before is read again, up to a bound. A number says nothing of who
asks, so an answer names its reader by a cookie, which HTTP clients with a jar, as the official one, send along: readers
of one list with one key each have places of their own. Another cookie has the place of the page behind the last one,
as `next` has it, for another process may serve that. The cookies say nothing else and open nothing.

Those who send none share their places: of two, the one that began first may see rows again that the other's first page
pushed on. Neither misses any, since a place is only ever overwritten by one that lies before it; so who goes by `next`
overwrites none.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from respan_guard.api.fields import clean_text
from respan_guard.api.wire import JSON, parse, to_json
from respan_guard.errors import InvalidInput

__all__ = ["MAX_PAGE_SIZE", "Page", "Pages", "Slice", "as_filters", "checked", "sorted_slice"]

MAX_PAGE_SIZE: Final = 1000
_REMEMBERED = 20_000
_COOKIE = "respan_guard_reader"
_BEHIND = "respan_guard_next"
_READER = re.compile(r"[0-9a-f]{32}")
_MAX_TOKEN, _MAX_COOKIE = 4_000, 3_500

R = TypeVar("R")
Place = list[Any]
"""Where a page begins: behind the row of these values. What they are is the list's own affair."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page that is asked for.

    Attributes:
        start: The place it begins behind; None for the first, or if that is not known (`skip` then says more).
        skip: How many rows to pass over first, because nobody remembers where the page begins.
        identity: Of the list in pages of this size, as one key sees it; by one reader, if it says which.
        reader: Who it is; a new one if it did not say.
        shared: Under which identity it is remembered, too, for who will not say who it is; None if it did.
        asked: Of the list.
        by_place: It was asked for by `next`, not by its number.
    """

    number: int
    size: int
    start: Place | None
    skip: int
    identity: str
    asked: str
    reader: str = ""
    shared: str | None = None
    by_place: bool = False


@dataclass(frozen=True, slots=True)
class Slice(Generic[R]):
    """What is on a page.

    Attributes:
        end: The place of its last row; None if it is empty.
        more: Whether another page may follow.
    """

    rows: list[R]
    end: Place | None
    more: bool


class Pages:
    """The places of one API's pages."""

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[str, int], Place] = OrderedDict()

    def asked(self, request: Request, query: Any, filters: object) -> Page:
        """Which page a request asks for: by `cursor`, else by `page`.

        Args:
            request: Its path and key are part of what is asked.
            query: With `page`, `page_size`, `cursor`.
            filters: What else picks rows.

        Raises:
            InvalidInput: The cursor is none of ours.
        """
        asked = _asked(request, query, filters)
        key = request.headers.get("authorization", "")
        shared = hashlib.sha256(f"{asked} {query.page_size} {key}".encode()).hexdigest()
        reader = request.cookies.get(_COOKIE, "")
        said = _READER.fullmatch(reader) is not None
        if not said:
            reader = secrets.token_hex(16)
        who = (f"{shared} {reader}", asked, reader, None if said else shared)
        if query.cursor is not None:
            number, place = _read_token(query.cursor, asked)
            return Page(number, query.page_size, place, 0, *who, by_place=True)
        number = query.page
        known = _behind(request, number, f"{asked} {query.page_size}")
        if known is None:
            known = self._places.get((who[0] if said else shared, number))
        skip = 0 if number == 1 or known is not None else (number - 1) * query.page_size
        return Page(number, query.page_size, None if number == 1 else known, skip, *who)

    def answer(self, request: Request, page: Page, rows: list[Any], part: Slice[Any], **more: Any) -> Response:
        """The answer with a page.

        Args:
            request: What was asked.
            page: Which page it is.
            rows: What is on it, as it is shown.
            part: Where it ends, and whether another may follow.
            more: What else is in the body.
        """
        if (place := part.end or page.start) is not None:  # behind an empty page is where it is
            for identity in (page.identity,) if page.shared is None else (page.identity, page.shared):
                self._remember((identity, page.number + 1), place, again=not page.by_place)
        before = self._places.get((page.shared or page.identity, page.number - 1))
        body = {
            "count": len(rows),
            "next": _link(request, page.number + 1, part.end, page.asked)
            if part.more and part.end is not None
            else None,
            "previous": _link(request, page.number - 1, before, page.asked) if page.number > 1 else None,
            "results": rows,
        }
        found = JSON(body | more)
        if page.shared is not None:  # without a path, so that it is for this list, wherever it seems to be mounted
            found.set_cookie(_COOKIE, page.reader, path=None, httponly=True, samesite="strict")
        if (
            place is not None
            and len(token := _token(page.number + 1, place, f"{page.asked} {page.size}")) <= _MAX_COOKIE
        ):
            found.set_cookie(_BEHIND, token, path=None, httponly=True, samesite="strict")
        return found

    def _remember(self, behind: tuple[str, int], place: Place, *, again: bool) -> None:
        if again or behind not in self._places:
            self._places[behind] = place
        self._places.move_to_end(behind)
        while len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)


def _asked(request: Request, query: Any, filters: object) -> str:
    """What is listed, whichever page of it and however long: a cursor is good for that only."""
    about = query.model_dump(exclude={"page", "page_size", "cursor", "include_fields", "filters"})
    text = to_json([request.scope["path"], {name: str(value) for name, value in sorted(about.items())}, filters])
    return hashlib.sha256(text).hexdigest()[:16]


def _link(request: Request, number: int, place: Place | None, asked: str) -> str:
    changes: dict[str, Any] = {"page": number}
    if place is not None and number > 1:
        changes["cursor"] = _token(number, place, asked)
    try:
        return str(request.url.remove_query_params("cursor").include_query_params(**changes))
    except ValueError:  # a Host that makes no URL
        raise InvalidInput("the request's Host header is no host", field="host") from None


def _behind(request: Request, number: int, asked: str) -> Place | None:
    """The place of a page, if it is the one behind that which the reader was shown last."""
    try:
        behind, place = _read_token(request.cookies.get(_BEHIND, ""), asked)
    except InvalidInput:
        return None
    return place if behind == number else None


def _token(number: int, place: Place, asked: str) -> str:
    return base64.urlsafe_b64encode(to_json([number, place, asked])).decode().rstrip("=")


def _read_token(text: str, asked: str) -> tuple[int, Place]:
    wrong = InvalidInput("cursor is none that this API gave; begin at page 1", field="cursor")
    if len(text) > _MAX_TOKEN or not text.isascii():
        raise wrong
    try:
        value = parse(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, InvalidInput):
        raise wrong from None
    if not isinstance(value, list) or len(value) != 3:
        raise wrong
    number, place, of = value
    if of != asked:
        raise _foreign()
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 1 << 40:
        raise wrong
    if not isinstance(place, list):
        raise wrong
    return number, place


def checked(place: Place | None, *kinds: type | tuple[type, ...]) -> Place | None:
    """A place, if its values are of these types.

    Raises:
        InvalidInput: A cursor that was made for another list, or made up.
    """
    if place is None:
        return None
    if len(place) == len(kinds) and all(
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (not isinstance(value, str) or value == clean_text(value))
        and (not isinstance(value, int) or abs(value) < 1 << 62)
        for value, kind in zip(place, kinds, strict=True)
    ):
        return place
    raise _foreign()


def sorted_slice(
    rows: list[R],
    key: Callable[[R], tuple[Any, str]],
    page: Page,
    *,
    descending: bool,
    names_descending: bool | None = None,
) -> Slice[R]:
    """A page of rows that are all here, in order of a value and a name that no other row has.

    What has no value comes before all that have one. Names are in the same direction, if nothing else is said.
    """
    names_descending = descending if names_descending is None else names_descending

    def order(row: R) -> tuple[int, Any, str]:
        value, name = key(row)
        return int(value is not None), int(value) if isinstance(value, bool) else value or 0, name

    def is_behind(row: R, place: Place) -> bool:
        *value, name = order(row)
        if value == place[:2]:
            return name < str(place[2]) if names_descending else name > str(place[2])
        return value < place[:2] if descending else value > place[:2]

    ordered = sorted(rows, key=lambda row: key(row)[1], reverse=names_descending)
    ordered.sort(key=lambda row: order(row)[:2], reverse=descending)
    place = checked(page.start, int, (int, str, Decimal), str)
    if place is not None:
        try:
            ordered = [row for row in ordered if is_behind(row, place)]
        except TypeError:
            raise _foreign() from None
    ordered = ordered[page.skip :]
    shown = ordered[: page.size]
    return Slice(shown, list(order(shown[-1])) if shown else None, more=len(ordered) > page.size)


def as_filters(body: Any, text: str | None = None) -> dict[str, Any]:
    """The filters of a body, else those that a query has as JSON; none if there are none.

    Raises:
        InvalidInput: They are no object.
    """
    if body is not None and not isinstance(body, Mapping):
        raise InvalidInput("the body must be a JSON object")
    filters = (body or {}).get("filters")
    if filters is None and text is not None:
        filters = parse(text)
    if filters is None:
        return {}
    if not isinstance(filters, Mapping):
        raise InvalidInput("filters must be a JSON object", field="filters")
    return dict(filters)


def _foreign() -> InvalidInput:
    return InvalidInput(
        "cursor belongs to another list: send the same filters and order with it, or begin at page 1", field="cursor"
    )
