"""The study's order of runs and its tables, on invented results; and that every method can be prepared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import analyse, rates
from benchmarks.studies import tasks
from benchmarks.studies.cells import Cell, Result, half_decade, nearest, read, wanted
from benchmarks.studies.methods import HEAD_LR, METHODS, prepare
from benchmarks.studies.tasks import Data
from tests import zoo

SETTING = ("wordnet", "lora", 8, "parameters")


def result(place: int, score: float | None, seed: int = 0, method: str = "lora", **details: object) -> Result:
    cell = Cell("wordnet", method, 8, "parameters", half_decade(place), seed)
    return Result(cell, score, {"trainable": 1000, "evaluations": {"10": 0.2, "20": score or 0.0}, **details})


def next_cells(results: list[Result], seeds: int = 1, **options: object) -> list[tuple[float, int]]:
    cells = wanted(results, [SETTING], {"lora": 1e-3}, seeds=seeds, **options)  # type: ignore[arg-type]
    return [(cell.lr, cell.seed) for cell in cells]


def test_the_grid_is_of_half_decades() -> None:
    assert [half_decade(place) for place in (-8, -7, -6, -5, -4)] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert [nearest(half_decade(place)) for place in range(-10, 2)] == list(range(-10, 2))


def test_a_sweep_goes_outward_until_the_best_is_inside() -> None:
    assert next_cells([]) == [(1e-3, 0), (3e-4, 0), (3e-3, 0)]
    rising = [result(-7, 0.5), result(-6, 0.6), result(-5, 0.7)]
    assert next_cells(rising) == [(1e-2, 0)]
    assert next_cells([*rising, result(-4, None)]) == []
    falling = [result(-7, 0.7), result(-6, 0.6), result(-5, 0.5)]
    assert next_cells(falling) == [(1e-4, 0)]


def test_the_best_two_rates_get_more_seeds_one_after_the_other() -> None:
    swept = [result(-7, 0.5), result(-6, 0.7), result(-5, 0.6)]
    assert next_cells(swept, seeds=3) == [(1e-3, 1), (3e-3, 1), (1e-3, 2), (3e-3, 2)]
    running = [Cell(*SETTING, 1e-3, 1)]
    assert next_cells(swept, seeds=2, running=running) == [(3e-3, 1)]


def test_results_survive_a_file_that_was_cut_short(tmp_path: Path) -> None:
    rows = [result(-6, 0.5), result(-5, None)]
    file = tmp_path / "study.jsonl"
    file.write_text("".join(row.to_json() + "\n" for row in rows) + '{"task": "wor')
    assert [(row.cell, row.score) for row in read(file)] == [(row.cell, row.score) for row in rows]


def test_a_table_compares_by_seed_at_each_ones_best_rate() -> None:
    rows = [result(-6, 0.5 + 0.01 * seed, seed) for seed in range(3)]
    rows += [result(-5, 0.4, 0), result(-7, 0.4, 0)]
    rows += [result(-6, 0.52 + 0.01 * seed, seed, "pissa") for seed in range(3)]
    ((setting),) = analyse.sweeps(rows).values()
    assert setting["lora"].best == 1e-3 and setting["lora"].inside and not setting["pissa"].inside
    difference = analyse.paired(setting["pissa"], setting["lora"])
    assert difference == (pytest.approx(0.02), pytest.approx(0.0, abs=1e-12))
    assert analyse.interval([1.0, 3.0]) == pytest.approx(12.71)
    lines = list(analyse.table(setting))
    assert lines[2].startswith("| pissa | 1,000 | 0.001 (edge of the sweep) | 0.5300 ± 0.0058 (3) | +0.0200")
    assert lines[3].startswith(
        "| lora | 1,000 | 0.001 | 0.5100 ± 0.0058 (3) | – | – | 0.0003, 0.001, 0.003 |"
    )


def test_tasks_are_pooled_where_their_scores_have_one_unit() -> None:
    def of(task: str, method: str, score: float) -> Result:
        cell = Cell(task, method, 8, "parameters", 1e-3, 0)
        return Result(cell, score, {"trainable": 1000, "evaluations": {}})

    scores = {"wordnet": (0.5, 0.6), "reuters": (0.9, 0.8), "definitions": (-2.0, -4.0)}
    scores["wordnet-short"] = scores["wordnet"]
    rows = [of(t, m, s) for t, pair in scores.items() for m, s in zip(("lora", "pissa"), pair, strict=True)]
    settings = {task: setting for (task, _, _), setting in analyse.sweeps(rows).items()}
    header, _, row = analyse.over_tasks(settings)
    assert header == "|method|wordnet|reuters|all (runs)|"
    assert row == "| pissa | +0.1000 | -0.1000 | +0.0000 ± 1.2710 (2) |"
    assert list(analyse.over_tasks({"definitions": settings["definitions"]})) == []


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.8), (-3.0, -2.0)])
def test_what_a_rate_loses_is_a_share_of_the_best_score(low: float, high: float) -> None:
    curve = {1e-4: low, 1e-2: high}
    assert rates._loss(curve, 1e-2) == rates._loss(curve, 1.0) == 0
    assert rates._loss(curve, 1e-4) == pytest.approx(0.5)
    assert rates._loss(curve, 1e-3) == pytest.approx(0.25)
    assert rates._score_of_chance("wordnet") == 0 > -10 > rates._score_of_chance("definitions")


def test_the_step_that_reaches_a_score_is_interpolated() -> None:
    run = result(-6, 0.6)
    assert analyse.steps_to(run, 0.4) == pytest.approx(15.0)
    assert analyse.steps_to(run, 0.1) == 10.0
    assert analyse.steps_to(run, 0.7) is None
    easier = result(-6, 0.5, evaluations={"10": 0.6, "20": 0.5})  # a quarter of the tests, then all of them
    assert analyse.steps_to(easier, 0.5) == 10.0 and analyse.steps_to(easier, 0.55) is None


def test_a_dialogue_goes_on_within_an_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [("0101", "Monica", "Not  even a date."), ("0101", "Joey", "Sure."), ("0102", "Ross", "Hi.")]
    lines = [f"01\t01\t{episode}\tTitle\t{author}\t {text}" for episode, author, text in said]
    (tmp_path / "friends-transcripts.tab").write_text("\n".join(["Season", "d", "", "", *lines, ""]))
    monkeypatch.setattr(tasks, "TEXTS", tmp_path)
    train, test = tasks.dialogue()
    assert train + test == [("Monica: Not even a date.\nJoey:", " Sure.")]


def test_batches_hold_all_rows_once_and_repeat_with_the_seed() -> None:
    rows = [([1] * (1 + i % 7), i) for i in range(64)]
    data = Data(rows, rows, ["a"], 0, False)
    batches = data.batches(8, 8, seed=1)
    assert sorted(torch.cat([b["labels"] for b in batches]).tolist()) == list(range(64))
    again, other = data.batches(8, 8, seed=1), data.batches(8, 8, seed=2)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, again, strict=True))
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, other, strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # in PEFT
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_own_part_at_its_own_rate(name: str) -> None:
    method = METHODS[name]
    model, batch = zoo.build("bert"), zoo.batch("bert")
    ready = prepare(
        model, method, rank=2, budget=None, lr=0.5, seed=0, head=("classifier",), calibration=[batch]
    )
    head = {id(p) for n, p in ready.model.named_parameters() if "classifier" in n and p.requires_grad}
    rates = {id(p): group["lr"] for group in ready.groups for p in group["params"]}
    wanted = {id(p) for p in ready.model.parameters() if p.requires_grad}
    assert set(rates) == wanted and head <= wanted
    assert {rates[each] for each in head} == {0.5 if method.trains == "head" else HEAD_LR}
    others = {lr for each, lr in rates.items() if each not in head}
    assert others == (set() if method.trains == "head" else {0.5, 0.5 * method.b_rate})
    assert ready.trainable == sum(
        p.numel() for p in ready.model.parameters() if p.requires_grad and id(p) not in head
    )
