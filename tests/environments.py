"""Environments of their own, for packages that can't or need not stand beside what everything else is tested with."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest


def python_with(config: pytest.Config, name: str, wanted: Sequence[str], *, timeout: float = 200) -> str:
    """A Python with some packages, over those that are installed here; made once, kept in pytest's cache.

    Without a package index it can't be made: that skips the test, but fails it in CI.

    Args:
        config: Knows the cache.
        name: Of the environment.
        wanted: The packages.
        timeout: Seconds that installing may take.
    """
    assert config.cache is not None
    what = zlib.crc32(repr([sys.prefix, sys.version, wanted]).encode())
    home = Path(config.cache.mkdir(name)) / f"{what:08x}"
    found = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = home / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, timeout=60)
        pip = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *wanted]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode and not os.environ.get("CI"):
            pytest.skip(f"no package index: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr
        (site,) = home.glob("**/site-packages")
        (site / "zz_main.pth").write_text(sysconfig.get_path("purelib"))  # behind its own packages
        ready.touch()
    return str(found)
