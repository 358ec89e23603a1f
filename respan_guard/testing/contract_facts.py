"""Rules of facts: compare and set, pages, sizes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from respan_guard.backends.base import Backend
from respan_guard.backends.facts import MAX_FACT_BYTES, MAX_KEY_BYTES, MAX_SPACE_BYTES
from respan_guard.errors import InvalidInput
from respan_guard.testing.contract_support import NOW, BackendFixture, dump, one, record

__all__ = ["FactRules"]


class FactRules(BackendFixture):
    """What others ask to be remembered."""

    async def test_a_fact_is_set_read_changed_and_deleted(self, backend: Backend) -> None:
        """Without a condition always; an empty text is a value, None is none."""
        assert await backend.fact("s", "k") is None
        assert await backend.set_fact("s", "k", None) is True
        for value in ("one", "two", "two", "", "日本語 🙂 e\u0301\n\t'\"\\"):
            assert await backend.set_fact("s", "k", value) is True
            assert await backend.fact("s", "k") == value
            assert await backend.facts("s") == [("k", value)]
        assert await backend.set_fact("s", "k", None) is True
        assert await backend.fact("s", "k") is None
        assert await backend.facts("s") == []

    @pytest.mark.parametrize("there", [None, "", "a", "b"])
    @pytest.mark.parametrize("expected", [None, "", "a"])
    @pytest.mark.parametrize("value", [None, "", "a", "c"])
    async def test_it_changes_only_what_was_expected(
        self, backend: Backend, there: str | None, expected: str | None, value: str | None
    ) -> None:
        """Equal, it is written, even if it is the same again; else nothing changes."""
        await backend.set_fact("s", "k", there)
        assert await backend.set_fact("s", "k", value, expected=expected) is (there == expected)
        assert await backend.fact("s", "k") == (value if there == expected else there)

    async def test_exactly_one_of_many_finds_what_all_expect(self, backend: Backend) -> None:
        """Tasks that compare and set the same fact at once: a new one, a known one, one to delete."""
        before: str | None = None
        for turn in ("created", "changed", "deleted"):
            values = [None if turn == "deleted" else f"{turn}-{task}" for task in range(16)]
            won = await asyncio.gather(*(backend.set_fact("s", "k", value, expected=before) for value in values))
            assert won.count(True) == 1, turn
            before = await backend.fact("s", "k")
            assert before == values[won.index(True)]

    async def test_a_counter_of_many_tasks_loses_nothing(self, backend: Backend) -> None:
        """Read, compare and set, again on failure: every task's steps are in the sum."""

        async def count(times: int) -> None:
            while times:
                seen = await backend.fact("s", "n")
                times -= await backend.set_fact("s", "n", str(int(seen or 0) + 1), expected=seen)
                await asyncio.sleep(0)

        await asyncio.gather(*(count(10) for _ in range(8)))
        assert await backend.fact("s", "n") == "80"

    async def test_spaces_are_apart(self, backend: Backend) -> None:
        """The same key in another space is another fact, whatever the two are called."""
        names = [("a", "bc"), ("ab", "c"), ("a:b", "c"), ("a", "b:c"), ("A", "bc"), ("a ", "bc")]
        for number, (space, key) in enumerate(names):
            assert await backend.set_fact(space, key, str(number), expected=None)
        assert [await backend.fact(space, key) for space, key in names] == list("012345")
        assert await backend.facts("a") == [("b:c", "3"), ("bc", "0")]
        assert await backend.facts("none") == []

    async def test_pages_are_in_order_of_code_points(self, backend: Backend) -> None:
        """Every key is on one page, upper case before lower, the astral planes last; a page is as long as asked for."""
        keys = [
            "a",
            "B",
            "Z",
            "_",
            "b",
            "ä",
            "z",
            "aa",
            "a\u0301",
            "\uffff",
            "🙂",
            "10",
            "9",
            "a b",
            "a/b",
            "%",
            "\x01",
        ]
        for key in keys:
            await backend.set_fact("s", key, key.upper())
        seen: list[tuple[str, str]] = []
        while page := await backend.facts("s", after=seen[-1][0] if seen else "", limit=4):
            assert len(page) == min(4, len(keys) - len(seen))
            seen += page
        assert seen == [(key, key.upper()) for key in sorted(keys)]
        assert await backend.facts("s") == seen
        assert await backend.facts("s", after="a") == seen[sorted(keys).index("a") + 1 :]
        assert await backend.facts("s", after="a!", limit=1) == [("a/b", "A/B")]

    async def test_pages_are_stable_while_facts_come_and_go(self, backend: Backend) -> None:
        """What stays is seen once, whatever is set or deleted between two pages, the last key seen included."""
        for key in "bdfhj":
            await backend.set_fact("s", key, "1")
        assert [key for key, _ in await backend.facts("s", limit=2)] == ["b", "d"]
        await backend.set_fact("s", "d", None)
        await backend.set_fact("s", "a", "1")
        await backend.set_fact("s", "e", "1")
        assert [key for key, _ in await backend.facts("s", after="d", limit=2)] == ["e", "f"]

    @pytest.mark.parametrize("name", ["'; DROP TABLE facts; --", "%", "*", "{tag}", "a\nb", "\u2028", "${x} %s", "s:k"])
    async def test_names_and_values_are_taken_literally(self, backend: Backend, name: str) -> None:
        """No character has a meaning of its own."""
        await backend.set_fact(name, name, name)
        await backend.set_fact(name, "other", "1")
        assert await backend.set_fact(name, name, name + "2", expected=name)
        assert dict(await backend.facts(name)) == {name: name + "2", "other": "1"}

    async def test_sizes_are_bounded_in_bytes(self, backend: Backend) -> None:
        """The longest of each is kept and compared whole; one byte more is refused, and changes nothing."""
        space, key, value = "ä" * (MAX_SPACE_BYTES // 2), "ä" * (MAX_KEY_BYTES // 2), "ä" * (MAX_FACT_BYTES // 2)
        assert await backend.set_fact(space, key, value)
        assert await backend.facts(space) == [(key, value)]
        assert await backend.set_fact(space, key, value[:-1], expected=value)
        for what, bad in (
            ("space", (space + "x", key, "1")), ("key", (space, key + "x", "1")), ("value", (space, key, value + "x")),
            ("space", ("", key, "1")), ("key", (space, "", "1")), ("space", ("a\0", key, "1")),
            ("key", (space, "a\0", "1")), ("value", (space, key, "\0")), ("key", (space, "\ud800", "1")),
            ("value", (space, key, "\udfff")),
        ):  # fmt: skip
            with pytest.raises(InvalidInput, match=what):
                await backend.set_fact(*bad)
        with pytest.raises(InvalidInput, match="expected"):
            await backend.set_fact(space, key, "1", expected=value + "x")
        reads: list[Any] = [backend.fact(space, ""), backend.fact("", key), backend.facts("", after="a")]
        for read in (*reads, backend.facts(space, after=key + "x")):
            with pytest.raises(InvalidInput):
                await read
        assert await backend.facts(space) == [(key, value[:-1])]

    async def test_facts_outlive_closing_and_touch_nothing_else(self, backend: Backend) -> None:
        """They are there after a close and an open; no other read shows them, no deletion or pruning takes them."""
        await one(backend, record("e", 3))
        before = await dump(backend)
        await backend.set_fact("s", "ann", "1")
        assert await dump(backend) == before
        await backend.close()
        await backend.open()
        assert await backend.fact("s", "ann") == "1"
        await backend.delete("ann", now=NOW)
        await backend.prune(1 << 20)
        assert await backend.facts("s") == [("ann", "1")]
        assert await backend.verify() == []
