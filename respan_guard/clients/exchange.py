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
from typing import TYPE_CHECKING, Protocol

from respan_guard.estimates import text_seen
from respan_guard.providers import Call, Reader, reader_for, usage_of_call
from respan_guard.sending import never_sent
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from respan_guard.admission import Admission, Claim
    from respan_guard.backends.base import Entry
    from respan_guard.context import Slot
    from respan_guard.guard import Guard

__all__ = ["Exchange"]

logger = logging.getLogger("respan_guard")


class Sent(Protocol):
    """The body of a request on its way.

    Attributes:
        taken: Whether it was asked for, or may have been.
    """

    taken: bool


class Exchange:
    """One call on its way.

    Args:
        guard: Whose call it is.
        call: What is asked for.
        request: The slot of the request that it is made in, if any.
        own: Its own admission, which ends with it; None if what it claimed is enough.
        around: The admission around it.
        claim: What it claimed of that one, which it is then recorded under.

    Attributes:
        body: What is sent. Once that was taken the call is presumed to have been made, unless an answer says better.
    """

    __slots__ = (
        "_admission",
        "_call",
        "_claim",
        "_done",
        "_guard",
        "_last",
        "_own",
        "_reader",
        "_request",
        "_started",
        "_status",
        "_within",
        "body",
    )

    def __init__(
        self,
        guard: Guard,
        call: Call,
        request: Slot | None,
        own: Admission | None = None,
        *,
        around: Admission | None = None,
        claim: Claim | None = None,
    ) -> None:
        self._done = False
        self._guard = guard
        self._call = call
        self._claim = claim
        self._own = own
        admission = own if claim is None else around
        assert admission is not None
        self._admission = admission
        self._request = request
        self._reader: Reader | None = None
        self._status = 0
        self._last: list[Entry] | None = None
        self.body: Sent | None = None
        self._started = guard.clock.monotonic()
        if own is not None:
            own.slot = request
            if own.customer_identifier:  # what is nobody's holds nothing
                guard.renewer.watch(own)  # from here on `__del__` sees to its end
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

    def failed(self, error: BaseException) -> None:
        """There was no answer, because of `error`."""
        if self.body is not None and never_sent(error):
            self.body.taken = False
        self.finish()

    def finish(self) -> None:
        """End the call, exactly once; from any thread. Waits for nothing and never fails."""
        if self._done:
            return
        self._done = True
        try:
            self._end()
        except BaseException:  # a signal's (a time limit, ^C), from in between
            self._end()
            raise

    def _end(self) -> None:
        """Book the call and give back what it held. Each step may be done twice: storage takes an entry once."""
        if self._last is None:
            self._last = self._entries()
        self._admission.settle(self._claim, *self._last, ending=self._own)

    def _entries(self) -> list[Entry]:
        try:
            entry = self._entry()
            if entry is None:
                return []
            if (witness := self._guard.recorder.witness) is not None:
                witness.saw(entry, self._within)
            return [entry]
        except Exception:  # a fault of ours must neither reach the app nor leak the hold
            logger.exception("the usage of a call could not be recorded")
            return []

    def _entry(self) -> Entry | None:
        usage = self._usage()
        if usage is not None:
            return self._admission.entry(usage, "client", call=self._call)
        sent = self.body is not None and self.body.taken
        return self._presumed() if 200 <= self._status < 300 or (sent and not self._status) else None

    def _presumed(self) -> Entry:
        if self._request is not None:
            self._request.recorded = True
        held = None
        if self._claim is not None:
            held = self._claim.amount + (self._own.held if self._own is not None else 0)
        return self._guard.admissions.presume(self._admission, self._call, held, seen=text_seen(self._reader))

    def __del__(self) -> None:
        """Nobody will end the call: its response is dropped, or whoever asked for it was interrupted before.

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
