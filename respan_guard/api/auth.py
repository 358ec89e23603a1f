"""Bearer keys: who may read, who may write."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterable, Sequence

from respan_guard.errors import ConfigurationError

__all__ = ["Keys"]

logger = logging.getLogger("respan_guard")


class Keys:
    """The keys of one API.

    Args:
        full: A key, or several, that may do everything; None to let everybody do so.
        read_only: Keys that may not change anything.

    Raises:
        ConfigurationError: There is no key, one is empty, or keys are given with None.
    """

    def __init__(self, full: str | Sequence[str] | None, read_only: str | Sequence[str]) -> None:
        self._keys = [(key, True) for key in _digests("api_key", full or ())]
        self._keys += [(key, False) for key in _digests("read_only_key", read_only)]
        self.open = full is None
        if self.open and self._keys:
            raise ConfigurationError("api_key=None lets everybody in, so read_only_key means nothing; leave one out")
        if not self.open and not self._keys:
            raise ConfigurationError("api_key is empty; give a key, or api_key=None to let everybody in")
        if self.open:
            logger.warning("RespanAPI was built with api_key=None: whoever reaches it may read and change everything")

    def may_write(self, headers: Iterable[tuple[bytes, bytes]]) -> bool | None:
        """Whether who sent these headers may change things (True) or only read (False); None for nobody we know.

        Takes as long whatever was sent: digests are compared, each with all, whichever fits.
        """
        if self.open:
            return True
        sent = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip(b" ")).digest()
        found: bool | None = None
        for known, writes in self._keys:
            if hmac.compare_digest(digest, known):
                found = writes
        return found if scheme.lower() == b"bearer" else None


def _digests(name: str, given: str | Sequence[str]) -> list[bytes]:
    keys = [given] if isinstance(given, str) else list(given)
    for key in keys:
        if not key.strip():
            raise ConfigurationError(f"{name} must be a secret, or several; one of them is empty")
        if key != key.strip() or "\n" in key or "\r" in key:
            raise ConfigurationError(f"{name} has white space around it or a line break in it; no header holds that")
    return [hashlib.sha256(key.encode()).digest() for key in keys]
