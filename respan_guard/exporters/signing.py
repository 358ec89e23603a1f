"""Signatures of the Standard Webhooks specification (symmetric, `v1`)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from respan_guard.errors import ConfigurationError

__all__ = ["Signer"]

_PREFIX = "whsec_"


class Signer:
    """Signs bodies; see https://github.com/standard-webhooks/standard-webhooks.

    Args:
        secret: "whsec_" and the base64 of 24 to 64 random bytes; several while one takes the place of another.

    Raises:
        ConfigurationError: It is no such secret.
    """

    def __init__(self, secret: str | Sequence[str]) -> None:
        secrets = [secret] if isinstance(secret, str) else list(secret)
        if not secrets:
            raise ConfigurationError("a webhook needs a secret to sign with")
        self._keys = [_key(text) for text in secrets]

    def headers(self, message_id: str, seconds: int, body: bytes) -> dict[str, str]:
        """The three headers of one attempt."""
        signed = f"{message_id}.{seconds}.".encode() + body
        signatures = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in self._keys]
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(seconds),
            "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        }

    def __repr__(self) -> str:
        return "<Signer>"


def _key(secret: object) -> bytes:
    wrong = ConfigurationError("a webhook's secret must be 'whsec_' and the base64 of 24 to 64 random bytes")
    if not isinstance(secret, str) or not secret.startswith(_PREFIX):
        raise wrong
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise wrong from None
    if not 24 <= len(key) <= 64:
        raise wrong
    return key
