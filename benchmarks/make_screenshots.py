"""Make the pictures of the README from the real pages: python benchmarks/make_screenshots.py (needs Chromium)."""

from __future__ import annotations

import asyncio
import base64
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from playwright.sync_api import sync_playwright

from respan_guard import Guard
from respan_guard.cli.seed import seed
from respan_guard.cli.serve import console_app
from respan_guard.testing import FakeClock
from respan_guard.testing.serving import serve

PICTURES = {"dashboard": ("", "light", 1000), "dashboard-dark": ("", "dark", 1000), "users": ("users", "light", 760)}
NOW = datetime(2026, 3, 20, 16, tzinfo=UTC)
TO_WEBP = """async (png) => {
  const image = new Image();
  image.src = "data:image/png;base64," + png;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/webp", 0.86).split(",")[1];
}"""


def main() -> None:
    here = Path(__file__).parents[1] / "docs"
    chromium = shutil.which("chromium") or sys.exit("no Chromium; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as place:
        url = f"sqlite:///{Path(place, 'demo.db')}?synchronous=normal"
        asyncio.run(seed(url, until=NOW))
        guard = Guard(url, clock=FakeClock(NOW), default_limits={"rate_limit": 60, "period_budget": 2.5})
        with serve(console_app(guard, "a password")) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--no-proxy-server"])
            for name, (path, scheme, height) in PICTURES.items():
                page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme=scheme)
                page.goto(f"{address}/{path}")
                page.fill("#password", "a password")
                page.click("text=Sign in >> nth=-1")
                page.wait_for_url(lambda url: "signin" not in url)
                page.wait_for_timeout(500)
                png = base64.b64encode(page.screenshot()).decode()
                blank = browser.new_page()
                webp = base64.b64decode(blank.evaluate(TO_WEBP, png))
                (here / f"{name}.webp").write_bytes(webp)
                print(f"{name}.webp {len(webp):,} bytes")
            browser.close()


if __name__ == "__main__":
    main()
