"""The report in a real browser, with the network off: what is seen, what is loaded, what a click does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lowrank
from lowrank import presets
from lowrank.formats.plan_table import plan_cells
from lowrank_cli import main
from tests import zoo
from tests.browser import browser

matplotlib = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow

ROWS = "[...document.querySelectorAll('.wide tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CONTRAST = """() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => {
    const color = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color;
    return node.parentElement ? behind(node.parentElement) : "rgb(255, 255, 255)";
  };
  return Math.min(...[...document.querySelectorAll("h1, h2, th, td, li, button")].map(node => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  }));
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lowrank.Plan]:
    """A report with everything in it: a log with scores, a trained adapter, mixed ranks, notes."""
    matplotlib.use("Agg")
    folder = tmp_path_factory.mktemp("runs") / ("a-run-with-a-long-name-" * 4 + "<1>")
    policy = presets.tlora(budget=900, target=("query", "value", "down"), train=("classifier",))
    batches = [zoo.batch("bert", seed=seed) for seed in range(3)]
    model = lowrank.wrap_model(zoo.build("bert"), policy, batches=batches, progress=False)
    scores = {"accuracy": 0.5}
    log = folder / "log.jsonl"
    lowrank.train.fit(model, batches, lr=1e-2, log=log, evaluate=lambda _: scores, progress=False)
    lowrank.save_adapter(model, folder / "adapter")
    out = folder / "report.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    return out, lowrank.plan_of(model)


@pytest.fixture(params=[(1200, "light"), (400, "light"), (400, "dark")], ids=str)
def page(request: pytest.FixtureRequest, chromium: Any, report: tuple[Path, lowrank.Plan]) -> Iterator[Any]:
    """The open report; a message on the console, an error and a request that fails all fail the test."""
    width, scheme = request.param
    context = chromium.new_context(
        offline=True,
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        is_mobile=width
        < 600,  # a telephone shows a page that does not say otherwise 980 pixels wide, and small
    )
    opened, complaints, asked = context.new_page(), [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("requestfailed", lambda request: complaints.append(request.url))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report[0].as_uri())
    assert opened.evaluate("innerWidth") == width
    yield opened
    assert complaints == [] and asked == [report[0].as_uri()]
    context.close()


def test_it_shows_the_plan_the_curves_and_the_updates(page: Any, report: tuple[Path, lowrank.Plan]) -> None:
    out, plan = report
    assert page.locator("h1").all_inner_texts() == [out.parent.name] == [page.title()]
    headings = ["Training", "Plan", "Updates", "Versions that wrote this report"]
    assert page.locator("h2").all_inner_texts() == headings
    assert page.evaluate(ROWS) == plan_cells(plan)[1:] and len(plan) > 5
    pictures = page.locator("svg")
    assert pictures.count() == 3
    for box in (picture.bounding_box() for picture in pictures.all()):
        assert box["width"] > 300 and box["height"] > 100


def test_it_fits_a_narrow_screen_and_can_be_read(page: Any) -> None:
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate(CONTRAST) >= 7  # what WCAG 2 asks for at its strictest level


def test_a_click_on_a_heading_sorts(page: Any, report: tuple[Path, lowrank.Plan]) -> None:
    rows = plan_cells(report[1])[1:]
    ranks = sorted(int(row[3]) for row in rows)
    assert len(set(ranks)) > 1 and [int(row[3]) for row in page.evaluate(ROWS)] != ranks
    head = page.locator(".wide th", has_text="rank")
    for order, expected in (("ascending", ranks), ("descending", ranks[::-1])):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert [int(row[3]) for row in page.evaluate(ROWS)] == expected
    page.locator(".wide th", has_text="projection").locator("button").click()
    assert sorted(page.evaluate(ROWS)) == sorted(rows)
    names = [row[0] for row in page.evaluate(ROWS)]
    assert names == sorted(names)
    assert head.get_attribute("aria-sort") is None
