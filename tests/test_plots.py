"""Pictures: what is drawn, where it is written, and that matplotlib is looked for only then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank
from lowrank import Plan, presets
from lowrank.train import History, Record
from tests import zoo

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def without_a_screen() -> Iterator[None]:
    before = matplotlib.get_backend(auto_select=False)
    matplotlib.use("Agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")
    if before is not None:
        matplotlib.use(before)


def history(steps: int) -> History:
    records = [
        Record(i, 1, 1 / i, 0.001 * i, 1.0, 100.0, 0.1 * i, {"accuracy": i / 100} if i % 10 == 0 else {})
        for i in range(1, steps + 1)
    ]
    return History(records)


def test_a_history_shows_loss_scores_and_learning_rate(tmp_path: Path) -> None:
    figure = history(40).plot()
    loss, accuracy, rate = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "accuracy", "learning rate"]
    single, smooth = loss.lines
    assert list(single.get_ydata()) == [1 / i for i in range(1, 41)]
    assert smooth.get_ydata()[-1] == pytest.approx((1 / 39 + 1 / 40) / 2)
    assert list(accuracy.lines[0].get_xdata()) == [10, 20, 30, 40]
    assert list(accuracy.lines[0].get_ydata()) == [0.1, 0.2, 0.3, 0.4]
    assert rate.lines[0].get_ydata()[-1] == pytest.approx(0.04)
    assert single.get_linestyle() != smooth.get_linestyle()  # they differ in grey too
    history(40).plot(tmp_path / "new" / "run.png")
    assert (tmp_path / "new" / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no steps to plot"):
        History().plot()


def test_a_plan_shows_its_ranks_by_layer_and_role(tmp_path: Path) -> None:
    plan = lowrank.plan_model(zoo.build("llama"), presets.lora(rank=4, target=("query", "value", "down")))
    changed = {p: a for p, a in plan.items()}
    first = next(p for p in plan if p.role.value == "query")
    changed[first] = lowrank.Allocation(rank=7, scaling=1.0)
    figure = Plan(changed).plot(tmp_path / "plan.svg")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1"]
    roles = [label.get_text() for label in axis.get_yticklabels()]
    assert roles == ["query", "value", "down"]
    cells = axis.images[0].get_array()
    assert cells.tolist() == [[7, 4], [4, 4], [4, 4]]
    assert sorted(text.get_text() for text in axis.texts) == ["4"] * 5 + ["7"]
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, lowrank; assert 'matplotlib' not in sys.modules and 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'lowrank-torch\[plots\]'"):
        history(3).plot()


def test_two_plans_are_compared_cell_by_cell(tmp_path: Path) -> None:
    model = zoo.build("llama")
    a = lowrank.plan_model(model, presets.lora(rank=4, target=("query", "value")))
    b = lowrank.plan_model(model, presets.lora(rank=2, target=("query", "down")))
    axis = lowrank.compare_plans(a, b).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["query", "value", "down"]
    assert axis.images[0].get_array().tolist() == [[-2, -2], [-4, -4], [2, 2]]
    assert [text.get_text() for text in axis.texts] == ["-2", "-2", "-4", "-4", "+2", "+2"]
    assert f"{a.trainable_parameters:,} → {b.trainable_parameters:,}" in axis.get_title(loc="left")
    lowrank.compare_plans(a, b, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
