"""Whose call a span is: right, or nobody's; never somebody else's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import baggage

from respan_guard.customer import normalise_identifier
from respan_guard.errors import ConfigurationError, InvalidIdentifier
from respan_guard.otel.names import as_json

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
say that were still open when the call began. All others are span attributes; "name#key.key" looks into the JSON of one.
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
        given = self._baggage(running)
        own = _Layers(running.noted if running is not None else None, attributes, {} if self.trust_baggage else given)
        for source in self.sources:
            if source == "context":
                found = context
            elif source == "parent":
                found = self._of_parents(running, given)
            else:
                found = _identifier(own.get(source))
            if found is not None:
                return found
        if self.trust_baggage:
            for source in self._attributes:
                if (found := _identifier(given.get(source))) is not None:
                    return found
        return None

    def profile(self, running: Running | None, attributes: Mapping[str, Any]) -> dict[str, str] | None:
        """Name and email that stand on the span."""
        given = {} if self.trust_baggage else self._baggage(running)
        own = _Layers(running.noted if running is not None else None, attributes, given)
        found = {
            field: value
            for field, names in _PROFILE.items()
            if (value := next((v for name in names if isinstance(v := own.get(name), str) and v), None)) is not None
        }
        return found or None

    def _baggage(self, running: Running | None) -> Mapping[str, object]:
        """The baggage that a call was made with. What an attribute has from there is a client's word."""
        return {} if running is None or running.context is None else baggage.get_all(running.context)

    def _of_parents(self, running: Running | None, given: Mapping[str, object]) -> str | None:
        if running is None:
            return None
        for above in running.open_above():
            span = above()
            attributes = span.attributes or {} if span is not None else {}
            own = _Layers(above.noted, attributes, {} if self.trust_baggage else given)
            for source in self._attributes:
                if (found := _identifier(own.get(source))) is not None:
                    return found
        return None


class _Layers:
    """Attributes as they were at the start, over those at the end; those whose names came as baggage are hidden."""

    __slots__ = ("_first", "_hidden", "_then")

    def __init__(
        self, at_start: Mapping[str, Any] | None, at_end: Mapping[str, Any], hidden: Mapping[str, object]
    ) -> None:
        self._first: Mapping[str, Any] = at_start or {}
        self._then = at_end
        self._hidden = hidden

    def get(self, source: str) -> Any:
        name, _, path = source.partition("#")
        if name in self._hidden:
            return None
        value = self._first[name] if name in self._first else self._then.get(name)
        if not path or value is None:
            return value
        found = as_json(value)
        for key in path.split("."):
            if not isinstance(found, Mapping):
                return None
            found = found.get(key)
        return found


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
