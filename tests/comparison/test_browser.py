"""The report in a real browser: it is drawn, it complains of nothing, and every figure has its place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from matplotlib.image import imread

from comparison_fixtures import language_modeling
from mhe_lightning.comparison.html import write_report
from mhe_lightning.comparison.tables import render
from mhe_lightning.comparison.task_table import comparison_table

REPORTS = sorted((Path(__file__).parents[2] / "docs" / "results").rglob("report.html"))
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
]
# Writes what was laid out, and the width that the page needs, to where --dump-dom shows it.
MEASURE = """<pre id="measured"></pre><script>
const sizes = {};
for (const figure of document.querySelectorAll("figure")) {
  const box = figure.querySelector("svg").getBoundingClientRect();
  const shapes = [...figure.querySelectorAll("svg path, svg use")].filter(e => e.getBoundingClientRect().width > 0);
  sizes[figure.id] = [box.width, box.height, shapes.length];
}
const {scrollWidth: page, clientWidth: view} = document.documentElement;
document.getElementById("measured").textContent = JSON.stringify({sizes, page, view});
</script></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's program, or a visible skip."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    comparison = language_modeling()
    table = render(comparison_table(comparison), "html")
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, [comparison], [table], title="Attention compared", command="mhe compare runs/*")[0]


def browse(chromium: str, page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """What the browser prints, and the lines of the page's console."""
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_report_is_drawn_without_console_errors(chromium: str, report: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    _, console = browse(chromium, report, tmp_path / "profile", "--window-size=1200,1500", f"--screenshot={picture}")
    assert console == []
    pixels = imread(picture)[..., :3]
    assert pixels.shape == (1500, 1200, 3)
    white = (pixels == 1).all(axis=-1)
    assert 0.5 < white.mean() < 0.97
    # text in the upper half, figures' colours in the lower
    assert not white[:300].all()
    colors = {tuple(color) for color in (pixels[750:] * 15).round().astype(int).reshape(-1, 3)[::7].tolist()}
    assert len(colors) > 30


def test_the_check_of_the_console_sees_errors(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<!DOCTYPE html><link rel="icon" href="data:,"><img src="http://127.0.0.1:9/no.png"><script>'
        'document.querySelector("img").onerror = () => console.error("lacks a picture"); undefinedName()</script>',
        encoding="utf-8",
    )
    _, console = browse(chromium, page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=2000")
    assert any("undefinedName" in line for line in console)
    assert any("lacks a picture" in line for line in console)


@pytest.mark.parametrize("width", [1200, 400])
def test_every_figure_is_laid_out(width: int, chromium: str, report: Path, tmp_path: Path) -> None:
    measured = tmp_path / "measured.html"
    text = report.read_text("utf-8")
    if width == 400:  # windows of browsers are not that narrow; frames are
        inner = tmp_path / "inner.html"
        inner.write_text(text.replace("</body>", FORWARD), encoding="utf-8")
        frame = f'<iframe src="{inner.name}" width="{width}" height="900"></iframe>'
        measured.write_text(f"<!DOCTYPE html><body>{frame}{RECEIVE}</body>", encoding="utf-8")
    else:
        measured.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    assert_whole(chromium, measured, text, tmp_path)


@pytest.mark.parametrize("page", REPORTS, ids=lambda page: page.parent.name)
def test_published_reports_are_whole(page: Path, chromium: str, tmp_path: Path) -> None:
    text = page.read_text("utf-8")
    measured = tmp_path / "measured.html"
    measured.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    assert_whole(chromium, measured, text, tmp_path)


def assert_whole(chromium: str, measured: Path, text: str, folder: Path) -> None:
    """Each figure of the page has its place and is drawn, nothing is complained of, the page fits the window."""
    dom, console = browse(
        chromium, measured, folder / "profile", "--dump-dom", "--window-size=1200,1500", "--virtual-time-budget=3000"
    )
    assert console == []
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom)
    assert found is not None
    data = json.loads(unescape(found[1]))
    assert list(data["sizes"]) == re.findall(r'<figure id="([^"]+)"', text)
    for name, (w, h, shapes) in data["sizes"].items():
        assert w > 200, name
        assert h > 100, name
        assert shapes > 20, name
    assert data["page"] <= data["view"]


# A frame from a file may not be read from outside, so it sends what it measured.
SEND = 'parent.postMessage(document.getElementById("measured").textContent, "*");'
FORWARD = MEASURE.replace("</script>", f"{SEND}</script>")
RECEIVE = """<pre id="measured"></pre><script>
addEventListener("message", event => { document.getElementById("measured").textContent = event.data; });
</script>"""
