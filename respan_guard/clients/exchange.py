"""One call through the client door: what it holds, what its reply says, and how it ends.

How calls end:

- a reply with its usage: that is recorded
- a success without usage, whether whole, broken off, closed early, left to the garbage collector or timed out, and
  work that was cancelled while the provider may have been at it: presumed by the setting `missing_usage`
- an answer that is no success, or a request that never left: nothing, and the hold is free again
"""

from __future__ import annotations

import _thread
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from respan_guard.providers import Call, Reader, reader_for, usage_of_call
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from respan_guard.admission import Admission
    from respan_guard.backends.base import Entry
    from respan_guard.context import Slot
    from respan_guard.guard import Guard

__all__ = ["Exchange"]

logger = logging.getLogger("respan_guard")

_NEVER_SENT = frozenset(
    {"ConnectError", "ConnectTimeout", "LocalProtocolError", "PoolTimeout", "ProxyError", "UnsupportedProtocol"}
    | {"WriteError", "WriteTimeout"}  # a request that is not wholly written is none
)


class Exchange:
    """One call on its way.

    Args:
        guard: Whose call it is.
        call: What is asked for.
        admission: Under which it is recorded: its own, which ends with it, or one around it that it claimed from.
        request: The slot of the request that it is made in, if any.
        claimed: What it claimed of the admission around it, nano-USD; 0 if the admission is its own.
        beside: Its own admission, if what it claimed was not enough.
    """

    __slots__ = (
        "_admission",
        "_beside",
        "_call",
        "_claimed",
        "_done",
        "_guard",
        "_reader",
        "_request",
        "_started",
        "_status",
        "_within",
    )

    def __init__(
        self,
        guard: Guard,
        call: Call,
        admission: Admission,
        request: Slot | None,
        claimed: int = 0,
        beside: Admission | None = None,
    ) -> None:
        self._claimed = claimed
        self._beside = beside
        self._guard = guard
        self._call = call
        self._admission = admission
        self._request = request
        self._reader: Reader | None = None
        self._status = 0
        self._done = False
        self._started = guard.clock.monotonic()
        witness = guard.recorder.witness
        self._within = None if witness is None else witness.called(call.model)

    def answered(self, status: int, content_type: str, encoding: str) -> Callable[[bytes], None] | None:
        """The provider answers.

        Args:
            status: The status code.
            content_type: Of the body.
            encoding: Of the body, "" for none.

        Returns:
            What takes the bytes of the body as they pass; None if they tell nothing.
        """
        self._status = status
        if 200 <= status < 300:
            self._reader = reader_for(content_type, encoding, self._guard.clock.monotonic)
        return None if self._reader is None else self._reader.feed

    def failed(self, error: BaseException, *, sent: bool) -> None:
        """There was no answer.

        Args:
            error: Why.
            sent: Whether the request may have left.
        """
        if sent and not any(kind.__name__ in _NEVER_SENT for kind in type(error).__mro__):
            self._status = 200
        self.finish()

    def finish(self) -> None:
        """End the call, exactly once; from any thread. Waits for nothing and never fails."""
        if self._done:
            return
        self._done = True
        last: list[Entry] = []
        try:
            usage = self._usage()
            if usage is not None:
                last.append(self._admission.entry(usage, "client"))
            elif 200 <= self._status < 300:
                last.append(self._presumed())
            if last and (witness := self._guard.recorder.witness) is not None:
                witness.saw(last[0], self._within)
        except Exception:  # a fault of ours must neither reach the app nor leak the hold
            logger.exception("the usage of a call could not be recorded")
        if self._claimed:
            self._admission.settle(self._claimed, *last, beside=self._beside)
        else:
            self._admission.end(*last)

    def _presumed(self) -> Entry:
        if self._request is not None:
            self._request.recorded = True
        held = None
        if self._claimed:
            held = self._claimed + (self._beside.held if self._beside is not None else 0)
        return self._guard.admissions.presume(self._admission, self._call, held)

    def abandoned(self) -> None:
        """Nobody will read the rest: the response is being collected as garbage.

        That happens anywhere, within a storage backend's lock too, so it is another thread that ends the call.
        """
        if self._done:
            return
        try:
            _thread.start_new_thread(self.finish, ())
        except RuntimeError:  # the interpreter is exiting
            self.finish()

    def _usage(self) -> Usage | None:
        if self._reader is None:
            return None
        return usage_of_call(self._reader, self._call, self._started, self._guard.clock.monotonic())
