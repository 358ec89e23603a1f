"""Proof that the sums are the entries', and what people should know of the server."""

from __future__ import annotations

from collections import Counter
from typing import Any

from respan_guard.backends.base import AMOUNTS, HOUR_MS, HOURS_KEPT, Amounts, Discrepancy, StoreInfo
from respan_guard.backends.cells import EVER, amounts_of
from respan_guard.backends.redis.link import Link
from respan_guard.backends.redis.rows import amounts_from, amounts_list, entry_from
from respan_guard.backends.redis.shelf import Shelf
from respan_guard.errors import BackendError, GuardError

__all__ = ["gathered", "info", "settings_of", "verify"]

_MANY = 100
_PAGE = 1000
_ATTEMPTS = 5
_LOOKS = 3


# -- verify ----------------------------------------------------------------------------------------


class _Changed(Exception):
    """Entries were pruned or a customer was deleted while the log was read."""


async def verify(shelf: Shelf) -> list[Discrepancy]:
    """Recompute every sum, while the store is in use; see `Backend.verify`."""
    found: list[Discrepancy] = []
    for part in range(shelf.parts.count):
        found += await _confirmed(shelf, part)
    return found


async def _confirmed(shelf: Shelf, part: int) -> list[Discrepancy]:
    """What is wrong with a part, however often one looks.

    An entry that is revised moves to the log's end. If it does so after its customer was looked at, and before the log
    was read up to then, it is missed; the next time it is where it went.
    """
    found = await _proved(shelf, part)
    for _ in range(_LOOKS - 1):
        if not found:
            break
        known = {(row.what, row.where) for row in found}
        found = [row for row in await _proved(shelf, part) if (row.what, row.where) in known]
    return found


async def _proved(shelf: Shelf, part: int) -> list[Discrepancy]:
    for _ in range(_ATTEMPTS):
        try:
            return await _Proof(shelf, part).run()
        except _Changed:
            continue
    raise BackendError("entries are being deleted; verify when that is done")


class _Proof:
    """Reads the log of a part to its end, and then each customer's sums with what came to the log up to then."""

    def __init__(self, shelf: Shelf, part: int) -> None:
        self.shelf = shelf
        self.part = part
        self.place = 0
        self.right: dict[int, dict[str, Amounts]] = {}  # by customer and "DAY:MODEL"
        self.entries: Counter[int] = Counter()
        self.presumed: dict[tuple[int, str], int] = {}  # costs of entries that may be revised
        self.latest = 0
        self.all: dict[tuple[str, str], Amounts] = {}  # (day, model) over all customers
        self.active: Counter[str] = Counter()  # customers by day
        self.hours: dict[int, dict[str, Amounts]] = {}  # by hour and model
        self.last_seen = 0
        self.found: list[Discrepancy] = []

    async def run(self) -> list[Discrepancy]:
        shelf, part = self.shelf, self.part
        moved = await shelf.ask(part, "HGET", "meta", "moved")
        before, hours_before = await self.days(), await self.kept_hours()
        await self.read_log()
        numbers: list[str] = [str(n) for n in range(1, int(await shelf.ask(part, "HGET", "meta", "born")) + 1)]
        for start in range(0, len(numbers), _MANY):
            seq, now_moved, rows = await shelf.run("check", part, *numbers[start : start + _MANY])
            await self.read_log(int(seq))
            if now_moved != moved:
                raise _Changed
            for row in rows:
                self.check(*row)
        self.check_days(before, await self.days())
        pruned = await shelf.ask(part, "HGET", "meta", "pruned_ms")
        if pruned is not None:
            self.check_hours(hours_before, await self.kept_hours(), int(pruned) // HOUR_MS + 1)
        return self.found

    async def read_log(self, end: int | None = None) -> None:
        """Add up the log, to its end or to a place that it had reached."""
        until = "+" if end is None else f"{end}"
        while True:
            rows = await self.shelf.ask(self.part, "XRANGE", "log", f"({self.place}-0", until, "COUNT", _PAGE)
            for place, fields in rows:
                self.place = int(place.partition("-")[0])
                self.count(dict(zip(fields[::2], fields[1::2], strict=True)))
            if len(rows) < _PAGE:
                break
        if end is not None:
            self.place = max(self.place, end)

    def count(self, fields: dict[str, str]) -> None:
        number = int(fields["c"])
        row = [0, number, "", fields["x"], fields["r"], fields["l"], fields["t"], fields["e"], None]
        try:
            entry = entry_from(row, self.place).entry
        except (ValueError, TypeError) as error:
            self.found.append(Discrepancy("entry damaged", f"{number} {self.place}", str(error), "readable"))
            return
        if int(fields["t"]) < max(self.latest, entry.at_ms):
            self.found.append(Discrepancy("log out of order", str(self.place), int(fields["t"]), self.latest))
        self.latest = max(self.latest, int(fields["t"]))
        sums = self.right.setdefault(number, {}).setdefault(f"{entry.day}:{entry.model}", Amounts())
        of_hour = self.hours.setdefault(entry.at_ms // HOUR_MS, {}).setdefault(entry.model, Amounts())
        if entry.kind == "presumed":
            before = self.presumed.get((number, entry.id))
            self.presumed[number, entry.id] = entry.cost or 0
            if before is not None:  # it was revised since we read it
                sums.cost += (entry.cost or 0) - before
                of_hour.cost += (entry.cost or 0) - before
                return
        self.entries[number] += 1
        sums.add(amounts_of(entry))
        of_hour.add(amounts_of(entry))

    def check(
        self, number: str, customer: str | None, totals: list[int], days: int, entries: int, rows: list[Any],
        base: list[Any], faults: list[Any], last_seen: int,
    ) -> None:  # fmt: skip
        """Compare what a customer has with what the log says."""
        self.last_seen = max(self.last_seen, last_seen)
        who = customer if customer is not None else f"number {number}"
        right = self.right.setdefault(int(number), {})
        for key, sums in base:
            right.setdefault(key, Amounts()).add(amounts_from(sums))
        stored = {key: amounts_from(sums) for key, sums in rows}
        for key in sorted(stored.keys() | right.keys()):
            self.compare(f"{who} {key}", stored.get(key, Amounts()), right.get(key, Amounts()), requests=False)
        sum_ = Amounts()
        for key, amounts in stored.items():
            sum_.add(amounts)
            day, _, model = key.partition(":")
            self.all.setdefault((day, model), Amounts()).add(amounts)
        own_days = {key.partition(":")[0] for key in stored}
        self.active.update(own_days)
        self.compare(f"{who} all days", amounts_from(totals), sum_, requests=True)
        pairs = [
            ("active days", days, len(own_days)),
            ("entries", entries, self.entries[int(number)]),
            *[tuple(fault) for fault in faults],
        ]
        self.found += [Discrepancy(what, who, is_, should) for what, is_, should in pairs if is_ != should]

    async def days(self) -> dict[str, tuple[dict[str, list[int]], int]]:
        """Sums of all customers together and their number, by day."""
        rows = await self.shelf.run("days", self.part, "days", "g:", 0, EVER, "1")
        return {day: (dict(sums), customers) for day, sums, customers in rows}

    def check_days(
        self, before: dict[str, tuple[dict[str, list[int]], int]], after: dict[str, tuple[dict[str, list[int]], int]]
    ) -> None:
        """Compare what is kept of all customers together; but for days on which something happened meanwhile."""
        for day in sorted(before.keys() | after.keys() | self.active.keys()):
            if before.get(day) != after.get(day):
                continue
            sums, customers = after.get(day, ({}, 0))
            right = {model: amounts for (of, model), amounts in self.all.items() if of == day}
            for model in sorted(sums.keys() | right.keys()):
                stored = amounts_from(sums.get(model, []))
                self.compare(f"all customers {day}:{model}", stored, right.get(model, Amounts()), requests=True)
            if customers != self.active[day]:
                self.found.append(Discrepancy("customers", f"day {day}", customers, self.active[day]))

    async def kept_hours(self) -> dict[int, dict[str, list[int]]]:
        """Sums of all customers together by hour, read in steps that hold up nobody."""
        hours = await self.shelf.ask(self.part, "ZRANGE", "hours", 0, -1)
        found: dict[int, dict[str, list[int]]] = {}
        for start in range(0, len(hours), _MANY):
            some = hours[start : start + _MANY]
            rows = await self.shelf.run("days", self.part, "hours", "t:", some[0], int(some[-1]) + 1, "0")
            found.update((int(hour), dict(sums)) for hour, sums, _ in rows)
        return found

    def check_hours(
        self, before: dict[int, dict[str, list[int]]], after: dict[int, dict[str, list[int]]], first: int
    ) -> None:
        """Compare the sums of hours with the log; but for hours in which something was booked meanwhile.

        An hour is there in full from `first` on, behind all that was pruned, if it is not so old that its sums may
        have been deleted. What was deleted last is not known: all before the first hour that is there; and by the
        time that customers were seen last, all before that less what is kept.
        """
        first = max(first, self.last_seen // HOUR_MS - HOURS_KEPT, min(after, default=1 << 40))
        for hour in sorted(hour for hour in after.keys() | self.hours.keys() if hour >= first):
            if before.get(hour) != after.get(hour):
                continue
            sums, right = after.get(hour, {}), self.hours.get(hour, {})
            for model in sorted(sums.keys() | right.keys()):
                stored = amounts_from(sums.get(model, []))
                self.compare(f"all {model} hour {hour}", stored, right.get(model, Amounts()), requests=False)

    def compare(self, where: str, stored: Amounts, right: Amounts, *, requests: bool) -> None:
        for name, is_, should in zip(AMOUNTS, amounts_list(stored), amounts_list(right), strict=True):
            if is_ != should and (requests or name != "requests"):  # requests have no entries
                self.found.append(Discrepancy(name, where, is_, should))


# -- the server ------------------------------------------------------------------------------------


async def settings_of(link: Link) -> dict[str, dict[str, str]]:
    """What each server says of itself; without what it does not let us ask, as hosted ones often do."""
    found: dict[str, dict[str, str]] = {}
    for server, told in (await link.tell("INFO")).items():
        found[server] = {name: str(value) for name, value in told.items()}
    for name in ("appendonly", "appendfsync", "save", "maxmemory-policy"):
        try:
            answers = await link.tell("CONFIG GET", name)
        except GuardError:
            break
        for server, answer in answers.items():
            found[server].update(dict(answer))
    for settings in found.values():
        settings.setdefault("appendonly", "yes" if settings.get("aof_enabled") == "1" else "no")
        settings.setdefault("maxmemory-policy", settings.get("maxmemory_policy", "unknown"))
        settings.setdefault("appendfsync", "unknown")
    return found


def problems_of(settings: dict[str, str]) -> list[str]:
    """Why no budget can rest on the server."""
    found = []
    policy = settings["maxmemory-policy"]
    if settings["appendonly"] != "yes":
        kept = (
            "only snapshots are kept, so a restart loses minutes" if settings.get("save") else "nothing is kept on disk"
        )
        found.append(f"appendonly is off: {kept}, and what was spent is spent again; set appendonly yes")
    if policy.startswith("allkeys-") and settings.get("maxmemory", "0") != "0":
        found.append(f"maxmemory-policy is {policy}: Redis drops what was spent when memory is short; set noeviction")
    return found


def warnings_of(settings: dict[str, str]) -> list[str]:
    """What people should know of the server."""
    found = []
    if settings["appendonly"] == "yes" and settings["appendfsync"] != "always":
        took = "the last second" if settings["appendfsync"] == "everysec" else "some seconds"
        if settings["appendfsync"] == "unknown":
            found.append("the server does not tell appendfsync; unless it is always, a power cut takes some seconds")
        else:
            found.append(f"appendfsync is {settings['appendfsync']}: a power cut takes {took}; always loses nothing")
    if settings.get("connected_slaves", "0") != "0" and settings.get("min_slaves_good_slaves", "0") == "0":
        found.append(
            "replicas are not waited for: a failover loses what they had not got yet; see min-replicas-to-write"
        )
    return found


async def info(shelf: Shelf) -> StoreInfo:
    """What `respan-guard check` says about the store."""
    link = shelf.link
    servers = await settings_of(link)
    metas = [await shelf.ask(part, "HMGET", "meta", "born", "seq", "schema") for part in range(shelf.parts.count)]
    records = [int(await shelf.ask(part, "XLEN", "log")) for part in range(shelf.parts.count)]
    first = next(iter(servers.values()))
    facts = {
        "server": f"{first.get('server_name', 'redis')} {first.get('valkey_version', first['redis_version'])}",
        "servers": str(len(servers)),
        "parts": str(shelf.parts.count),
        "appendonly": first["appendonly"],
        "appendfsync": first["appendfsync"],
        "maxmemory-policy": first["maxmemory-policy"],
        "memory used": first.get("used_memory_human", "unknown"),
        "replicas": first.get("connected_slaves", "unknown"),
        "customers": str(sum(int(born) for born, _, _ in metas)),
        "records": str(sum(records)),
    }
    problems, warnings = gathered(servers)
    durable = not problems and all(settings["appendfsync"] == "always" for settings in servers.values())
    return StoreInfo(link.at.url, str(metas[0][2]), durable, facts, (*problems, *warnings), problems)


def gathered(servers: dict[str, dict[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems and warnings of all servers, each once."""
    problems = dict.fromkeys(text for settings in servers.values() for text in problems_of(settings))
    warnings = dict.fromkeys(text for settings in servers.values() for text in warnings_of(settings))
    return tuple(problems), tuple(warnings)
