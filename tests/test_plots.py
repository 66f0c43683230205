"""Pictures: what is drawn, where it is written, and that matplotlib is looked for only then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank import Plan, presets
from lowrank.train import History, Record
from tests import zoo
from tests.helpers import perturb, wrapped

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


def test_a_long_title_is_not_cut_off() -> None:
    policy = presets.lora(budget=3_000, target=("query", "value"))
    plan = lowrank.plan_model(zoo.build("llama"), policy)
    for figure in (plan.plot(), lowrank.compare_plans(plan, plan)):
        figure.canvas.draw()
        title = figure.axes[0]._left_title.get_window_extent()
        assert 0 <= title.x0 < title.x1 <= figure.bbox.width
        assert 0 <= title.y0 < title.y1 <= figure.bbox.height


def lines(figure: Any) -> dict[tuple[str, str], list[list[float]]]:
    """The y values of each line of a role's two panels, dots apart: panel → lines."""
    found = {}
    for left, right in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        role = left.get_ylabel().split("\n")[0]
        found[role, "values"] = [list(line.get_ydata()) for line in left.lines]
        found[role, "shares"] = [
            list(each.get_ydata()) for each in right.lines if each.get_marker() == "None"
        ]
        found[role, "dots"] = [list(each.get_xdata()) for each in right.lines if each.get_marker() == "o"]
    return found


def expected(matrix: torch.Tensor) -> tuple[list[float], list[float]]:
    values = torch.linalg.svdvals(matrix.double())
    squares = values.square().cumsum(0)
    return (values / values[0]).tolist(), (squares / squares[-1]).tolist()


def same(found: list[float], values: list[float]) -> bool:
    return found == pytest.approx(values, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_spectrum_shows_the_frozen_weights(adapted: bool, tmp_path: Path) -> None:
    """Also in a wrapped model, whose adapters do not count."""
    policy = presets.pissa(rank=3, target=("key", "down"))
    plain = zoo.build("llama")
    plan = lowrank.plan_model(plain, policy)
    model = perturb(wrapped("llama", policy)) if adapted else plain
    figure = lowrank.plot_spectrum(model, None if adapted else plan, tmp_path / "spectrum.png")
    found = lines(figure)
    assert {role for role, _ in found} == {"key", "down"}
    for role in ("key", "down"):
        projections = [p for p in plan if p.role.value == role]
        assert len(found[role, "values"]) == len(projections) == 2
        for i, p in enumerate(projections):
            values, shares = expected(p.weight(plain).detach())
            assert same(found[role, "values"][i], values) and same(found[role, "shares"][i], shares)
        assert found[role, "dots"] == [[3], [3]]
    first, second = figure.axes[0].lines
    assert first.get_linestyle() != second.get_linestyle()  # they differ in style, and in lightness
    red, green, blue = torch.tensor([each.get_color()[:3] for each in (first, second)]).unbind(1)
    dark, light = 0.3 * red + 0.6 * green + 0.1 * blue
    assert light - dark > 0.3
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", [presets.lora, presets.pissa])
def test_a_spectrum_shows_the_updates(method: Any) -> None:
    model = perturb(wrapped("llama", method(rank=3, target="value")))
    before = [p.clone() for p in model.parameters()]
    found = lines(lowrank.plot_spectrum(model, of="update"))
    layers = list(lowrank.adapted_layers(model).values())
    for i, layer in enumerate(layers):
        values, shares = expected(layer.delta_weight())
        count = len(found["value", "values"][i])
        assert same(found["value", "values"][i], values[:count]) and count >= 3
        assert same(found["value", "shares"][i], shares[:count]) and shares[count - 1] == pytest.approx(1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("method", [presets.eva, presets.tlora])
def test_a_spectrum_shows_the_inputs(method: Any) -> None:
    model, policy = zoo.build("bert"), method(rank=2, target=("query", "value"))
    statistics = lowrank.measure(model, policy, [zoo.batch("bert")], progress=False)
    plan = lowrank.plan_model(model, policy, statistics=statistics)
    found = lines(lowrank.plot_spectrum(model, plan, of="input", statistics=statistics))
    for p in plan.adapted:
        measured = statistics[p]
        covariance = measured.covariance if measured.token_covariance is None else measured.token_covariance
        variances = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp_min(0)
        shares = (variances.cumsum(0) / variances.sum()).tolist()
        assert any(same(line, shares) for line in found[p.role.value, "shares"])


def test_what_has_no_spectrum_is_said() -> None:
    model = wrapped("llama", presets.lora(rank=2))
    with pytest.raises(ValueError, match="every update is zero.*train first"):
        lowrank.plot_spectrum(model, of="update")
    with pytest.raises(ValueError, match="statistics="):
        lowrank.plot_spectrum(model, of="input")
    with pytest.raises(ValueError, match="expected one of 'weight', 'update', 'input', got 'x'"):
        lowrank.plot_spectrum(model, of="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not wrapped.*give the plan"):
        lowrank.plot_spectrum(zoo.build("llama"))
    with pytest.raises(ValueError, match="not wrapped, so it has no update"):
        lowrank.plot_spectrum(zoo.build("llama"), lowrank.plan_of(model), of="update")


def test_a_spectrum_of_many_layers_stays_small(tmp_path: Path) -> None:
    """Thousands of values are thinned, the dot's place kept; the legend names six lines at most."""
    from lowrank.plots import spectra

    values = [1 / k for k in range(1, 5001)]
    figure = spectra({"query": [(str(i), values, 777) for i in range(40)]}, tmp_path / "many.svg")
    axis = figure.axes[1]
    assert all(len(line.get_xdata()) <= 201 and 777 in line.get_xdata() for line in figure.axes[0].lines)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["0", "8", "16", "23", "31", "39"]
    assert (tmp_path / "many.svg").stat().st_size < 2**20
