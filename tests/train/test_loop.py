"""`fit` learns, repeats, accumulates, reports, and refuses what cannot work."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lowrank.train import History, NonFiniteGradient, NonFiniteLoss, fit


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def problem(examples: int = 64) -> tuple[nn.Sequential, TensorDataset]:
    """A small network and a linear map for it to learn."""
    torch.manual_seed(1)
    x = torch.randn(examples, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))
    return model, TensorDataset(x, x @ torch.randn(4, 2))


def quiet(*arguments: Any, **options: Any) -> History:
    return fit(*arguments, progress=False, **options)


def state(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_it_learns() -> None:
    model, data = problem()
    history = quiet(model, DataLoader(data, 16, shuffle=True), regression, epochs=25, lr=1e-2)
    assert len(history) == 100 and history[-1].step == 100 and history[-1].epoch == 25
    assert sum(history.losses[-10:]) < 0.1 * sum(history.losses[:10])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_default_loss_trains_a_mapping_model() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=F.cross_entropy(self.table(input_ids).mean(1), labels))

    batch = {"input_ids": torch.tensor([[0, 1], [2, 3]]), "labels": torch.tensor([0, 1])}
    assert quiet(Classifier(), [batch] * 30, lr=0.1).losses[-1] < 0.1


def test_only_what_requires_grad_changes() -> None:
    model, data = problem()
    model[0].requires_grad_(False)
    frozen, trained = state(model[0]), state(model[3])
    quiet(model, DataLoader(data, 16), regression)
    assert same(frozen, state(model[0])) and not same(trained, state(model[3]))


def test_a_seed_repeats_a_run_and_leaves_the_generator_alone() -> None:
    model, data = problem()
    runs = []
    for seed in (0, 0, 1):
        before = torch.random.get_rng_state()
        runs.append(
            quiet(
                copy.deepcopy(model), DataLoader(data, 16, shuffle=True), regression, epochs=2, seed=seed
            ).losses
        )
        assert torch.equal(before, torch.random.get_rng_state())
        torch.rand(3)
    assert runs[0] == runs[1] != runs[2]


def test_without_a_seed_it_goes_on_from_where_the_generator_is() -> None:
    model, data = problem()
    loader = DataLoader(data, 16, shuffle=True)
    runs = [quiet(copy.deepcopy(model), loader, regression, seed=None).losses for _ in range(2)]
    torch.manual_seed(5)
    runs += [quiet(copy.deepcopy(model), loader, regression, seed=None).losses]
    assert runs[0] != runs[1]
    assert quiet(copy.deepcopy(model), loader, regression, seed=5).losses == runs[2]


def test_evaluating_changes_nothing_of_the_training() -> None:
    model, data = problem()
    loader = DataLoader(data, 16, shuffle=True)
    alone = quiet(copy.deepcopy(model), loader, regression, epochs=2)

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"draw": torch.rand(()).item()}

    watched = quiet(copy.deepcopy(model), loader, regression, epochs=2, evaluate=evaluate, evaluate_every=3)
    assert watched.losses == alone.losses
    assert list(watched.evaluations) == [3, 6, 8]


@pytest.mark.parametrize(("options", "expected"), [({"epochs": 2}, [4, 8]), ({"steps": 6}, [6])])
def test_evaluation_is_once_an_epoch_or_at_the_end(options: dict[str, int], expected: list[int]) -> None:
    model, data = problem()
    history = quiet(model, DataLoader(data, 16), regression, evaluate=lambda model: {"one": 1}, **options)
    assert history.evaluations == {step: {"one": 1.0} for step in expected}


def test_evaluate_returns_a_mapping() -> None:
    model, data = problem()
    with pytest.raises(ValueError, match=r"expected a mapping .*, got float"):
        quiet(model, DataLoader(data, 16), regression, evaluate=lambda model: 0.5)


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [10, 3, 14, 5]])
def test_accumulated_batches_make_one_large_batch(sizes: list[int]) -> None:
    model, data = problem(32)
    model.double()  # AdamW divides gradients by their size, and so makes rounding in small ones large
    model[2].p = 0.0
    x, y = (tensor.double() for tensor in data.tensors)
    small = list(zip(x.split(sizes), y.split(sizes), strict=True))
    large = copy.deepcopy(model)
    together = quiet(large, [(x, y)], regression, epochs=3, lr=1e-2)
    apart = quiet(model, small, regression, epochs=3, lr=1e-2, accumulate=4)
    assert len(apart) == 3
    assert apart.losses == pytest.approx(together.losses, rel=1e-6)  # recorded in fp32
    assert apart[0].grad_norm == pytest.approx(together[0].grad_norm, rel=1e-9)
    torch.testing.assert_close(state(model), state(large), atol=1e-9, rtol=1e-9)


def test_accumulated_batches_count_by_their_label_tokens() -> None:
    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    ids, labels = torch.randint(6, (2, 8)), torch.randint(4, (2, 8))
    labels[0, 1:] = -100
    model = nn.Embedding(6, 4)
    small = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in (0, 1)]
    large = quiet(copy.deepcopy(model), [{"input_ids": ids, "labels": labels}], loss)
    apart = quiet(copy.deepcopy(model), small, loss, accumulate=2)
    assert apart.losses == pytest.approx(large.losses, rel=1e-5)
    equal = quiet(copy.deepcopy(model), small, loss, accumulate=2, weight=lambda batch: 1.0)
    singles = [quiet(copy.deepcopy(model), [batch], loss).losses[0] for batch in small]
    assert equal.losses[0] == pytest.approx(sum(singles) / 2)


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    model, data = problem(5)
    history = quiet(model, DataLoader(data, 1), regression, accumulate=2, epochs=2)
    assert [(record.step, record.epoch) for record in history] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the optimizer sees at each step: the groups' rates, and the norm of the gradient."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW) -> None:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm(gradients).item()
        seen.append({"norm": norm, "rates": [group["lr"] for group in optimizer.param_groups]})
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (100.0, 7.0), (None, 7.0)])
def test_the_gradient_is_clipped(clip: float | None, expected: float, steps: list[dict[str, Any]]) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return 7 * model(batch).sum()

    history = quiet(nn.Linear(1, 1, bias=False), [torch.ones(1, 1)] * 2, loss, clip=clip)
    assert [step["norm"] for step in steps] == pytest.approx([expected] * 2)
    assert [record.grad_norm for record in history] == [7.0, 7.0]


def test_rates_follow_the_schedule_in_every_group(steps: list[dict[str, Any]]) -> None:
    model, data = problem()
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[3].parameters()}]
    loader = DataLoader(data, 16)
    history = quiet(model, loader, regression, parameters=groups, lr=1e-3, schedule="linear", warmup=1)
    factors = (1, 1, 2 / 3, 1 / 3)
    assert [step["rates"] for step in steps] == [pytest.approx([1e-2 * f, 1e-3 * f]) for f in factors]
    assert [record.lr for record in history] == [step["rates"][0] for step in steps]


def test_autocast_runs_forward_in_bfloat16_and_keeps_the_parameters() -> None:
    model, data = problem()
    seen = []
    model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    history = quiet(model, DataLoader(data, 16), regression, epochs=10, lr=1e-2, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert history.losses[-1] < 0.5 * history.losses[0]


def test_modes_are_restored_each(tmp_path: Path) -> None:
    model, data = problem()
    model.eval()
    model[2].train()
    modes = [module.training for module in model.modules()]
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    quiet(model, DataLoader(data, 16), regression, evaluate=lambda model: {"x": 1.0}, evaluate_every=1)
    assert all(seen) and [module.training for module in model.modules()] == modes


class Stop(BaseException):
    """What an interrupt is: no Exception."""


def interrupted(loader: DataLoader) -> Iterator[Any]:
    yield from loader
    raise Stop


def test_an_interrupt_leaves_the_history_the_log_and_the_modes(tmp_path: Path) -> None:
    model, data = problem()
    model.eval()
    log, before = tmp_path / "deeper" / "run.jsonl", torch.random.get_rng_state()
    with pytest.raises(Stop) as caught:
        quiet(model, interrupted(DataLoader(data, 16)), regression, steps=10, log=log)
    assert len(caught.value.history) == 4 and History.load(log) == caught.value.history
    assert not any(module.training for module in model.modules())
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_step_is_in_the_log_at_once(tmp_path: Path) -> None:
    model, data = problem()
    log = tmp_path / "run.jsonl"
    log.write_text("an older run\n")
    lengths = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        lengths.append(len(History.load(log)))
        return regression(model, batch)

    history = quiet(model, DataLoader(data, 16), loss, log=log)
    assert lengths == [0, 1, 2, 3] and History.load(log) == history


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad: float) -> None:
    model, data = problem()
    states = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        states.append(state(model))
        return regression(model, batch) * (bad if len(states) == 6 else 1)

    with pytest.raises(
        NonFiniteLoss, match=rf"the loss is {bad} at step 3, in batch 2 of its epoch"
    ) as caught:
        quiet(model, DataLoader(data, 16), loss, accumulate=2, epochs=2)
    assert isinstance(caught.value, ValueError) and len(caught.value.history) == 2
    assert same(state(model), states[-1]) and not same(states[0], states[-1])


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(NonFiniteGradient, match=r"norm is nan at step 1, though the loss is \[0.0\]"):
        quiet(model, [torch.ones(1, 1)], lambda model, batch: model(batch).abs().sqrt().sum())
    assert torch.equal(model.weight, torch.zeros(1, 1))


def test_a_parameter_without_a_gradient_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    before = state(model)

    def loss(model: nn.ModuleDict, batch: Tensor) -> Tensor:
        return model["used"](batch).square().mean()

    with pytest.raises(
        ValueError, match=r"no gradient to 2 of what is to train: idle\.weight, idle\.bias; freeze"
    ):
        quiet(model, [torch.ones(1, 2)], loss)
    assert same(before, state(model))
    assert len(quiet(model, [torch.ones(1, 2)], loss, allow_unused=True)) == 1
    assert same(before[2:], state(model)[2:])
    with pytest.raises(ValueError, match=r"no gradient to 1 of what is to train: one of shape \(3,\)"):
        quiet(model, [torch.ones(1, 2)], loss, parameters=[model["used"].weight, nn.Parameter(torch.ones(3))])


def test_a_loss_that_nothing_trained_reaches_is_named() -> None:
    model, data = problem()
    with pytest.raises(ValueError, match="depends on nothing that requires grad"):
        quiet(model, DataLoader(data, 16), lambda model, batch: torch.tensor(1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected a positive integer, got 0"),
        ({"epochs": 1.5}, "epochs: expected a positive integer, got 1.5"),
        ({"steps": 0}, "steps: expected a positive integer"),
        ({"accumulate": True}, "accumulate: expected a positive integer"),
        ({"evaluate_every": 0, "evaluate": lambda model: {}}, "evaluate_every: expected a positive integer"),
        ({"evaluate_every": 2}, "evaluate_every= needs evaluate="),
        ({"clip": 0.0}, "clip: expected a positive norm, or None"),
        ({"clip": math.nan}, "clip: expected a positive norm, or None"),
        (
            {"autocast": torch.float32},
            "autocast: expected torch.bfloat16, torch.float16 or None, got torch.float32",
        ),
        ({"lr": -1.0}, "lr: expected a positive number"),
        ({"schedule": "step"}, "schedule: expected .*, got 'step'"),
        ({"warmup": 2.0}, "warmup"),
        ({"steps": 3, "epochs": 2}, "not both"),
        ({"parameters": []}, "nothing requires grad"),
    ],
)
def test_bad_options_are_refused_before_anything_is_touched(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, data = problem()
    model.eval()
    before, generator = state(model), torch.random.get_rng_state()
    gradient = model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ValueError, match=message):
        quiet(model, DataLoader(data, 16), regression, log=tmp_path / "run.jsonl", **options)
    assert same(before, state(model)) and model[0].weight.grad is gradient and not model.training
    assert torch.equal(generator, torch.random.get_rng_state()) and not (tmp_path / "run.jsonl").exists()


def test_gradients_of_what_is_not_trained_do_not_pile_up() -> None:
    model, data = problem()
    before, seen = state(model[0]), []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(model[0].weight.grad)
        return regression(model, batch)

    quiet(model, DataLoader(data, 16), loss, parameters=model[3].parameters())
    assert seen == [None] * 4 and model[0].weight.grad is None and same(before, state(model[0]))


def test_gradients_of_before_do_not_count() -> None:
    model, data = problem()
    twin = copy.deepcopy(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    loader = DataLoader(data, 16)
    assert quiet(model, loader, regression).losses == quiet(twin, loader, regression).losses


def test_the_bar_shows_the_run_and_can_be_switched_off(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # what is too long is cut off
    model, data = problem()
    fit(model, DataLoader(data, 16), regression)
    shown = capfd.readouterr().err
    assert "4/4" in shown and all(word in shown for word in ("loss=", "lr=", "tokens_s="))
    fit(model, DataLoader(data, 16), regression, progress=False)
    assert capfd.readouterr() == ("", "")


def test_records_are_plausible() -> None:
    model, data = problem()
    model[2].p = 0.0
    x, y = data[:16]
    regression(model, (x, y)).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    history = quiet(model, DataLoader(data, 16), regression)
    times = [record.seconds for record in history]
    assert times == sorted(times) and times[0] > 0
    assert history[0].tokens_per_second == pytest.approx(16 / times[0])
    assert history[0].grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_it_learns_on_a_gpu_and_leaves_its_generator_alone(autocast: torch.dtype | None) -> None:
    model, data = problem()
    model.cuda()
    before = torch.cuda.get_rng_state()
    history = quiet(
        model,
        DataLoader(data, 16, shuffle=True),
        regression,
        epochs=25,
        lr=1e-2,
        autocast=autocast,
        accumulate=2,
    )
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert sum(history.losses[-10:]) < 0.1 * sum(history.losses[:10])
