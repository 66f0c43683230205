"""``lowrank report``: one file that needs nothing else, from a folder with an adapter and a log."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

import lowrank
from lowrank import presets
from lowrank.cli.report import sections
from lowrank.formats.plan_table import plan_remarks
from lowrank_cli import main
from tests import zoo

matplotlib = pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """The tags of a page, its text, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = [v or "" for name, v in attributes if name in ("src", "href", "xlink:href")]
        self.loaded += [value for value in values if not value.startswith(("#", "data:"))]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    matplotlib.use("Agg")
    folder = tmp_path / "run <1>"
    model = lowrank.wrap_model(
        zoo.build("bert"), presets.pissa(rank=2, train=("classifier",)), progress=False
    )
    scores = {"accuracy": 0.5}
    lowrank.train.fit(
        model, [zoo.batch("bert")] * 4, log=folder / "log.jsonl", evaluate=lambda _: scores, progress=False
    )
    lowrank.save_adapter(model, folder / "adapter")
    return folder


def test_it_holds_plan_curves_and_what_was_trained(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 3 and page.loaded == []
    assert not {"link", "img", "iframe"} & set(page.tags)
    for expected in (
        "run <1>",
        "classifier",
        "accuracy after step 4",
        "0.5",
        "Principal",
        lowrank.__version__,
    ):
        assert expected in page.text, expected
    plan = lowrank.plan_of(lowrank.load_adapter(zoo.build("bert"), run / "adapter"))
    for remark in plan_remarks(plan):
        assert remark in page.text


def test_without_a_log_it_holds_the_plan(run: Path, tmp_path: Path) -> None:
    (run / "log.jsonl").unlink()
    out = tmp_path / "report.html"
    assert main(["report", str(run / "adapter"), "--out", str(out)]) == 0
    assert Page(out.read_text(encoding="utf-8")).tags.count("svg") == 2


def test_what_it_cannot_tell_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    (run / "other.jsonl").write_text("")
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "name one by --log" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "expected one adapter of lowrank" in capsys.readouterr().err and not out.exists()


def test_the_memory_of_a_step_is_in_it_where_it_is_known(run: Path) -> None:
    model = lowrank.load_adapter(zoo.build("bert"), run / "adapter")
    plan, memory = lowrank.plan_of(model), lowrank.memory_report(model, None, batch=2, tokens=5)
    found = dict(sections(plan, None, {}, memory))
    assert Page(found["Memory"]).text == str(memory) and "at the peak" in found["Memory"]
    assert "Memory" not in dict(sections(plan, None, {}))
