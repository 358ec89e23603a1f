"""Every benchmark, one after another, each in a process of its own: `make bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    failed = 0
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"\n=== {path.stem}", flush=True)
        failed |= subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}"], check=False).returncode
    sys.exit(1 if failed else 0)
