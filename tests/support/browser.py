"""Pages in a headless Chromium."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the path")

# Loads the page in a frame of each width and tells what sticks out of it.
_PROBE = """<!doctype html><title>probe</title><body><script>
const widths = %s, found = [];
addEventListener("message", () => 0);
(async () => {
  for (const width of widths) {
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:900px;border:0`;
    frame.src = "%s";
    document.body.append(frame);
    await new Promise((done) => frame.onload = done);
    await new Promise((done) => setTimeout(done, 1500));
    const page = frame.contentDocument, root = page.documentElement;
    const charts = page.querySelectorAll(".charts figure > div");
    const drawn = [...charts].filter((one) => one.querySelector("svg.main-svg")).length;
    const cut = [...page.querySelectorAll("figure, .tile, pre, h1, li, summary, table")]
      .filter((one) => one.getBoundingClientRect().right > width + 1 || one.scrollWidth > one.clientWidth + 1).length;
    found.push([width, root.scrollWidth, charts.length, drawn, cut].join(" "));
    frame.remove();
  }
  document.body.dataset.found = found.join(";");
})();
</script></body>"""


def look_at(page: Path, widths: list[int]) -> tuple[list[list[int]], list[str]]:
    """For each width: the width, that of its content, charts, charts that are drawn, elements that are cut. Then
    the messages of the console."""
    probe = page.with_name("probe.html")
    probe.write_text(_PROBE % (widths, page.name))
    dom, messages = rendered(f"file://{probe}")
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match, dom[-2000:]
    return [[int(number) for number in one.split()] for one in match[1].split(";")], messages


def rendered(address: str) -> tuple[str, list[str]]:
    """The page as HTML once its scripts have run, and the messages of the console."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1500,1000"),
            *("--virtual-time-budget=60000", "--dump-dom", address),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
