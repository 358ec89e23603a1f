"""The kill switch: a mode for all processes of a store, whatever each was configured with.

It lies in the store, so it survives restarts. Each home that is in use looks at it twice a second, beside the
requests; one that was idle looks before its first decision, or before a record that is awaited. What is only posted
is not held up: the look begins with it. A process whose own setting is `mode="off"` has no store to look into and
stays off; while storage is down, what was last seen goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from respan_guard.backends.base import AuditRow
from respan_guard.decision import as_datetime
from respan_guard.errors import GuardError, InvalidInput
from respan_guard.identifiers import MAX_TEXT_BYTES, check_text
from respan_guard.policies import has_limits
from respan_guard.telemetry import telemetry

if TYPE_CHECKING:
    from respan_guard.guard import Guard
    from respan_guard.home import Home
    from respan_guard.lanes import Lane
    from respan_guard.options import Mode

__all__ = ["MODES", "SPACE", "Switch", "Switched"]

SPACE = "control"
"""The facts that all processes of a store look at."""
_MODE = "mode"
_OWN_LIMITS = "own-limits"
_EVERY = 0.5
_PATIENCE = 0.05
_IDLE = 20  # looks without anything sent, after which a home stops looking
MODES: Final = ("enforce", "shadow", "off")
logger = logging.getLogger("respan_guard")


@dataclass(frozen=True, slots=True)
class Switched:
    """Where the kill switch stands.

    Attributes:
        mode: The mode for all processes.
        at_ms: Since when.
        actor: Who did it.
        reason: Why.
    """

    mode: Mode
    at_ms: int
    actor: str = ""
    reason: str = ""

    @property
    def at(self) -> datetime:
        """Since when."""
        return as_datetime(self.at_ms)


class Switch:
    """Which mode is in force in this process, and for all: `await guard.switch.set("off", reason="...")`.

    Attributes:
        off: Nothing is asked, and nothing recorded.
        shadow: Nobody is refused.
        stands: Where the switch was last seen; None if each process goes by its own setting.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._configured: Mode = guard.settings.mode
        self._announced = False
        self._switched = 0  # how often, here
        self._looking: set[asyncio.Task[Switched | None]] = set()
        self.stands: Switched | None = None
        self.off = self._configured == "off"
        self.shadow = self._configured == "shadow"

    @property
    def mode(self) -> Mode:
        """The mode in force."""
        if self.stands is None or self._configured == "off":
            return self._configured
        return self.stands.mode

    def attach(self, lane: Lane) -> None:
        """Have whatever is sent from the lane's home wake it, also where nobody is ever admitted."""
        home = lane.home
        if home is not None:
            home.wakes = lambda: self.wake(home)

    async def wake(self, lane: Lane) -> None:
        """Look, and have the lane's home go on looking as long as it is used.

        Where storage hangs, whoever wakes it goes on soon with what was last seen: its own deadline is still to come.
        """
        telemetry.look()
        home = lane.home
        if home is None or not home.asleep:
            return
        home.asleep = False
        home.repeat(_EVERY, lambda: self._again(home))
        if not home.opened:
            await self.look(lane)
            return
        look = asyncio.ensure_future(self.look(lane))
        self._looking.add(look)
        look.add_done_callback(self._looking.discard)
        await asyncio.wait({look}, timeout=_PATIENCE)

    async def is_off(self) -> bool:
        """Whether nothing is recorded, for whoever asks before it was ever looked, or after nobody did for a while."""
        if not self.off:
            lane = self._guard.lane()
            if lane.asleep:
                await self.wake(lane)
        return self.off

    async def look(self, lane: Lane) -> Switched | None:
        """Read the store's word, if it can be had, and go by it."""
        telemetry.look()
        policies, clock = self._guard.policies, self._guard.clock
        began, switched = clock.monotonic(), self._switched
        try:
            facts = dict(await lane.call(lambda backend: backend.facts(SPACE), self._guard.storage_timeout))
        except GuardError:
            policies.missed(clock.monotonic())
            return self.stands
        policies.heard(began)
        if _OWN_LIMITS in facts:
            self._announced = policies.any_own = True
        if switched == self._switched:  # else it was asked before this process switched it, and says what was before
            self._obey(_read(facts.get(_MODE)))
        return self.stands

    async def _again(self, home: Home) -> bool:
        """One look; whether to go on."""
        await self.look(home)
        home.asleep = home.idle(_IDLE) and self.stands is None  # while off, nothing is sent that could wake it
        return not home.asleep

    async def set(self, mode: Mode | None, *, reason: str = "", actor: str = "") -> None:
        """Switch all processes of the store within a second; audited, and it survives restarts.

        Args:
            mode: "enforce", "shadow" or "off", whatever each process was set to; None gives that back.
            reason: Why.
            actor: Who does it.

        Raises:
            InvalidInput: There is no such mode, or `reason` or `actor` is no text that can be kept.
                Nothing was switched.
            StorageUnavailable: Storage gave no answer; it may have been switched.
        """
        if mode is not None and mode not in MODES:
            raise InvalidInput(f"mode must be one of {', '.join(MODES)}, got {mode!r}", field="mode")
        check_text(reason, "reason")
        check_text(actor, "actor")
        guard = self._guard
        now = guard.now_ms()
        switched = None if mode is None else Switched(mode, now, actor, reason)
        lane = guard.lane()
        text = None if switched is None else json.dumps(asdict(switched))
        before = _read(await lane.call(lambda backend: backend.fact(SPACE, _MODE)))
        row = AuditRow(now, "", "switch", actor, _shown(before), _shown(switched))
        await lane.call(lambda backend: backend.set_fact(SPACE, _MODE, text))
        self._switched += 1
        self._obey(switched)
        await lane.call(lambda backend: backend.add_audit(row))

    async def announce_limits(self, params: Mapping[str, Any], patience: float) -> None:
        """Let all processes know that some customer is about to have limits of its own: any stranger may, then."""
        if not self._announced and has_limits(params):
            await self._guard.lane().call(lambda backend: backend.set_fact(SPACE, _OWN_LIMITS, "yes"), patience)
            self._announced = True

    def _obey(self, stands: Switched | None) -> None:
        before, self.stands = self.mode, stands
        if self._configured == "off":
            return
        self.off, self.shadow = self.mode == "off", self.mode == "shadow"
        if self.mode != before:
            why = "each process's own setting" if stands is None else f"{stands.actor or 'somebody'}: {stands.reason}"
            logger.warning("switched from %s to %s (%s)", before, self.mode, why)


def _read(text: str | None) -> Switched | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
        switched = Switched(found["mode"], int(found["at_ms"]), _kept(found["actor"]), _kept(found["reason"]))
    except (ValueError, KeyError, TypeError):
        switched = None
    if switched is None or switched.mode not in MODES:
        logger.error("the kill switch can't be read, and is left aside: %r", text[:200])
        return None
    return switched


def _kept(text: object) -> str:
    """A text as every store keeps it: a fact holds any, as JSON, and the audit has to take what stood there before."""
    return str(text)[:MAX_TEXT_BYTES].encode("utf-8", "replace").decode().replace("\0", "?")


def _shown(switched: Switched | None) -> dict[str, Any]:
    return {"mode": "as configured"} if switched is None else {"mode": switched.mode, "reason": switched.reason}
