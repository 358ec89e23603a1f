"""An authority of the tests' own, and certificates that it signs; made with `openssl`, trusted by nobody else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["Authority"]


class Authority:
    """Signs certificates of servers. Without `openssl` the test is skipped, but fails under CI.

    Args:
        directory: Where its files go.
        name: What tells it from another one in the same directory.
    """

    def __init__(self, directory: Path, name: str = "authority") -> None:
        if shutil.which("openssl") is None:
            if os.environ.get("CI"):
                pytest.fail("openssl is not installed")
            pytest.skip("openssl is not installed")
        self._directory = directory
        self._key = directory / f"{name}.key"
        self.certificate = directory / f"{name}.pem"
        """What a client has to trust."""
        self._make(
            self._key, self.certificate, f"/CN=Test {name}",
            "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def sign(self, *names: str) -> tuple[Path, Path]:
        """Make a server's certificate for names like "DNS:localhost" and "IP:127.0.0.1": certificate and key."""
        stem = self._directory / f"{self.certificate.stem}-{'-'.join(names).replace(':', '_')}"
        certificate, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
        signing = ("-CA", str(self.certificate), "-CAkey", str(self._key))
        # An authority's certificate may be taken for a server's unless it says that it is none.
        self._make(
            key, certificate, "/CN=server",
            f"subjectAltName={','.join(names)}", "basicConstraints=critical,CA:FALSE", signing=signing,
        )  # fmt: skip
        return certificate, key

    def _make(
        self, key: Path, certificate: Path, subject: str, *extensions: str, signing: tuple[str, ...] = ()
    ) -> None:
        added = [word for extension in extensions for word in ("-addext", extension)]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-subj", subject, "-keyout", key, "-out", certificate, *added, *signing],
            check=True, capture_output=True,
        )  # fmt: skip
