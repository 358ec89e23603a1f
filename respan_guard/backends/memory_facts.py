"""The facts of a store in memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from respan_guard.backends.facts import ANY, Expected

__all__ = ["Facts"]


class Facts:
    """Values by space and key, the keys of a space in order. Not locked."""

    def __init__(self) -> None:
        self._spaces: dict[str, tuple[list[str], dict[str, str]]] = {}

    def put(self, space: str, key: str, value: str | None, expected: Expected) -> bool:
        """Compare and set."""
        keys, values = self._spaces.get(space) or ([], {})
        stored = values.get(key)
        if expected is not ANY and stored != expected:
            return False
        if value is not None:
            if stored is None:
                insort(keys, key)
            values[key] = value
        elif stored is not None:
            del values[key], keys[bisect_left(keys, key)]
        if values:
            self._spaces[space] = (keys, values)
        else:
            self._spaces.pop(space, None)
        return True

    def get(self, space: str, key: str) -> str | None:
        """One value."""
        return self._spaces[space][1].get(key) if space in self._spaces else None

    def page(self, space: str, after: str, limit: int) -> list[tuple[str, str]]:
        """Keys above `after`, with their values."""
        keys, values = self._spaces.get(space) or ([], {})
        start = bisect_right(keys, after)
        return [(key, values[key]) for key in keys[start : start + max(limit, 0)]]
