"""Batches of a store that is open, and what it acknowledged with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from respan_guard.backends.base import Op, Outcome
from respan_guard.backends.redis.recent import Recent
from respan_guard.backends.redis.rows import Encoder, outcome_from
from respan_guard.backends.redis.shelf import Shelf
from respan_guard.errors import GuardError

__all__ = ["Batches"]

_CLOSING = 1.0  # seconds that the last look may take
logger = logging.getLogger("respan_guard")


class Batches:
    """Sends batches to the parts of a store, and looks whether it kept what it acknowledged where that is in doubt."""

    def __init__(self, shelf: Shelf, encoder: Encoder) -> None:
        self._shelf = shelf
        self._link = shelf.link
        self._encoder = encoder
        self._now: int | None = None  # what the last batch was told
        count = shelf.parts.count
        self._recent = [Recent(self._link.way(part), counted=count == 1) for part in range(count)]

    async def send(self, part: int, ops: Sequence[Op], latest: int, now: int | None) -> list[Outcome]:
        """Apply a batch to a part. `latest` is the time that was last applied."""
        recent, self._now = self._recent[part], now
        await self._assure(part, recent, latest, now)
        known = recent.seq
        try:
            before, after, outcomes = await self._run(part, ops, latest, now)
        except BaseException:
            recent.failed()
            raise
        recent.keep(ops, outcomes, self._link.way(part), known, before, after)
        await self._assure(part, recent, latest, now)
        return outcomes

    async def look_back(self, latest: int) -> None:
        """Look for the last time, at what is in doubt: no batch will come that would find it out."""
        known = [(part, recent) for part, recent in enumerate(self._recent) if recent.knows_any]
        looks = [self._assure(part, recent, latest, self._now) for part, recent in known]
        try:
            async with asyncio.timeout(_CLOSING):
                for failure in await asyncio.gather(*looks, return_exceptions=True):
                    if failure is not None:
                        raise failure
        except (GuardError, TimeoutError) as error:
            said = str(error) or "no answer in time"
            logger.warning("whether %s still has what it acknowledged last can't be seen: %s", self._link.at.url, said)

    async def _assure(self, part: int, recent: Recent, latest: int, now: int | None) -> None:
        """Where it is in doubt, look whether all is there that was acknowledged, and store again what is not."""
        if not recent.doubts(self._link.way(part)) or not self._link.is_open:
            return
        async with recent.looking:
            way = self._link.way(part)  # before it is asked: if that ends meanwhile, the next batch looks again
            if not recent.doubts(way):
                return
            asked, others, doubted = recent.parted()
            before, after, answers = await self._run(part, asked, latest, now)
            if not recent.is_there(answers, before):
                _, after, more = await self._run(part, others, latest, now)
                recent.restored(more, before, self._link.at.url)
            recent.trusted(way, after, doubted)

    async def _run(self, part: int, ops: Sequence[Op], latest: int, now: int | None) -> tuple[int, int, list[Outcome]]:
        """Run a batch; where the part's log ended before it and after it, and the answers."""
        shelf, server = self._shelf, "1" if now is None else "0"
        reply = await shelf.run("apply", part, latest, server, shelf.timed, *self._encoder.batch(ops))
        return reply[0], reply[1], [outcome_from(row) for row in reply[2:]]
