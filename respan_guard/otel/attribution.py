"""Whose call a span is: right, or nobody's; never somebody else's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from opentelemetry import baggage

from respan_guard.customer import normalise_identifier
from respan_guard.errors import ConfigurationError, InvalidIdentifier
from respan_guard.otel.names import as_json
from respan_guard.otel.running import attributes_of

if TYPE_CHECKING:
    from respan_guard.otel.running import Running

__all__ = ["CUSTOMER_SOURCES", "Attribution", "propagated_by_respan"]

logger = logging.getLogger("respan_guard")

CUSTOMER_SOURCES = (
    "context",
    "respan.customer_params.customer_identifier",
    "respan.customer.identifier",
    "respan.customer_identifier",
    "keywordsai.customer_params.customer_identifier",
    "user.id",
    "enduser.id",
    "langfuse.user.id",
    "langfuse.trace.user_id",
    "traceloop.association.properties.customer_identifier",
    "traceloop.association.properties.customer_id",
    "traceloop.association.properties.user_id",
    "gen_ai.user",
    "gen_ai.user.id",
    "llm.user",
    "metadata#customer_identifier",
    "metadata#customer_id",
    "metadata#user_id",
    "langfuse.trace.metadata.customer_identifier",
    "langfuse.observation.metadata.customer_identifier",
    "metadata.user_api_key_end_user_id",
    "llm.invocation_parameters#user",
    "llm.invocation_parameters#safety_identifier",
    "llm.invocation_parameters#metadata.user_id",
    "respan.metadata.anthropic.request#metadata.user_id",
    "parent",
)
"""Where the customer is looked for, first match wins.

"context" is the guard's own word: the admission in force, or `guard.on_behalf_of`. "parent" is what the spans around
that were still open said when the call began. All others are span attributes; "name#key.key" looks into the JSON of
one.
"""
_PROFILE = {
    "name": ("respan.customer_params.name", "keywordsai.customer_params.name"),
    "email": ("respan.customer_params.email", "keywordsai.customer_params.email"),
}
_NOBODY = frozenset({"", "None", "none", "null", "undefined", "anonymous", "default"})


class Attribution:
    """Finds the customer of a call.

    Args:
        sources: Where to look, in this order.
        trust_baggage: Whether W3C baggage, which any client can send, may name the customer.

    Raises:
        ConfigurationError: A source is none.
    """

    def __init__(self, sources: Sequence[str], *, trust_baggage: bool) -> None:
        if isinstance(sources, str) or "" in sources:
            raise ConfigurationError(
                f'customer_sources must be a list of "context", "parent" and names of attributes, got {sources!r}'
            )
        self.sources = tuple(sources)
        self.trust_baggage = trust_baggage
        self._attributes = tuple(source for source in sources if source not in ("context", "parent"))
        behind = self.sources[self.sources.index("parent") :] if "parent" in self.sources else ()
        self._asks_parents, self._context_first = bool(behind), "context" not in behind
        self.keys = frozenset(source.partition("#")[0] for source in self._attributes)
        self.noted = self.keys | {name for names in _PROFILE.values() for name in names}
        """Attributes that are noted when a span starts: they may be pushed out later, or be overwritten."""

    def find(self, running: Running | None, attributes: Mapping[str, Any], context: str | None) -> str | None:
        """The customer of a call, or None.

        Args:
            running: What was noted when its span started.
            attributes: What its span says now.
            context: For whom the code worked that made the call.
        """
        own = self._layers(running, attributes)
        for source in self.sources:
            if source == "context":
                found = context
            elif source == "parent":
                found = self._of_parents(running)
            else:
                found = _identifier(own.get(source))
            if found is not None:
                return found
        if self.trust_baggage and running is not None and running.context is not None:
            given = baggage.get_all(running.context)
            for source in self._attributes:
                if (found := _identifier(given.get(source))) is not None:
                    return found
        return None

    def note_around(self, running: Running, most: int | None = None) -> None:
        """Note what the open spans around a span that starts say of the customer.

        When the call is read they may say another, who is somebody else, or be gone.
        A worker that is started lazily goes on within a request's span that has long ended: that customer is not its.

        Args:
            running: Of the span that starts.
            most: How far up to look; to the first span that is over if left out.
        """
        if not self._asks_parents or (running.customer is not None and self._context_first):
            return
        noted, found = self.noted, None
        for above in islice(running.above(), most):
            if above.ended:
                break
            span = above()
            attributes = {} if span is None else attributes_of(span)
            first = above.noted
            if first is None and noted.isdisjoint(attributes):
                continue
            now = {name: attributes[name] for name in list(attributes) if name in noted}
            found = [*(found or ()), (now, first, above.given)]
        running.around = found

    def profile(self, running: Running | None, attributes: Mapping[str, Any]) -> dict[str, str] | None:
        """Name and email that stand on the span."""
        own = self._layers(running, attributes)
        found = {
            field: value
            for field, names in _PROFILE.items()
            if (value := next((v for name in names if isinstance(v := own.get(name), str) and v), None)) is not None
        }
        return found or None

    def _layers(self, running: Running | None, attributes: Mapping[str, Any]) -> _Layers:
        if running is None:
            return _Layers(None, attributes, None)
        return _Layers(running.noted, attributes, None if self.trust_baggage else running.given)

    def _of_parents(self, running: Running | None) -> str | None:
        for now, first, given in (running.around if running is not None else None) or ():
            own = _Layers(now, first or {}, None if self.trust_baggage else given)
            for source in self._attributes:
                if (found := _identifier(own.get(source))) is not None:
                    return found
        return None


class _Layers:
    """Attributes as they were at one time, over those of another, without what was copied there from baggage."""

    __slots__ = ("_copied", "_first", "_then")

    def __init__(
        self, first: Mapping[str, Any] | None, then: Mapping[str, Any], copied: Mapping[str, object] | None
    ) -> None:
        self._first: Mapping[str, Any] = first or {}
        self._then = then
        self._copied = copied

    def get(self, source: str) -> Any:
        name, _, path = source.partition("#")
        value = self._own(name, self._first.get(name))
        if value is None:
            value = self._own(name, self._then.get(name))
        if not path or value is None:
            return value
        found = as_json(value)
        for key in path.split("."):
            if not isinstance(found, Mapping):
                return None
            found = found.get(key)
        return found

    def _own(self, name: str, value: Any) -> Any:
        """An attribute's value, unless baggage says the same, which then is where it may be from."""
        if self._copied is None or value is None:
            return value
        for key in (name, _in_baggage(name)):
            if key in self._copied and _is_copy(value, self._copied[key]):
                return None
        return value


def _in_baggage(name: str) -> str:
    """The name under which Langfuse propagates what it puts on spans as `name`."""
    if name in ("user.id", "langfuse.user.id", "langfuse.trace.user_id"):
        return "langfuse_user_id"
    return f"langfuse_metadata_{name.rpartition('.metadata.')[2]}" if name.startswith("langfuse.") else name


def _is_copy(value: object, given: object) -> bool:
    """Whether an attribute says what baggage said; limits of the span may have cut it."""
    said, sent = str(value).strip(), str(given).strip()
    return said == sent or (bool(said) and sent.startswith(said))


def _identifier(value: object) -> str | None:
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, str) and value.strip() in _NOBODY):
        return None
    try:
        return normalise_identifier(value)
    except InvalidIdentifier as error:
        logger.debug("a span names a customer that can't be one: %s", error)
        return None


def propagated_by_respan() -> dict[str, Any] | None:
    """What Respan's own SDK propagates here, as attributes; None where it isn't used."""
    factory = sys.modules.get("respan_tracing.utils.span_factory")
    if factory is None:
        return None
    try:
        found = factory.read_propagated_attributes()
        return dict(found) if isinstance(found, Mapping) and found else None
    except Exception:
        logger.debug("what Respan propagates could not be read", exc_info=True)
        return None
