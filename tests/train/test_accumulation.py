"""`fit(accumulate=n)` gives the gradient of the one large batch, however a loss counts its terms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank
from lowrank import notices, presets
from lowrank.batches import count_examples, count_targets, count_tokens
from lowrank.train import History, fit
from tests import zoo

IGNORED = -100


def gradient(
    model: nn.Module, batches: list[Any], loss: Any = None, **options: Any
) -> tuple[list[Tensor], History]:
    """What the optimizer gets in the one step that a copy of ``model`` takes over ``batches``."""
    twin, seen = copy.deepcopy(model), []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            every = [p for group in self.param_groups for p in group["params"]]
            seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in every])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        history = fit(
            twin,
            batches,
            loss,
            accumulate=len(batches),
            clip=None,
            progress=False,
            allow_unused=True,
            **options,
        )
    (found,) = seen
    return found, history


def check(model: nn.Module, small: list[Any], large: Any, loss: Any = None, **options: Any) -> None:
    """The small batches in one step are the large batch: same gradient, same loss, same norm."""
    apart, records = gradient(model, small, loss, **options)
    together, wanted = gradient(model, [large], loss)
    assert any(bool(each.any()) for each in together)
    scale = max(each.abs().max().item() for each in together)
    torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-12 * scale)
    assert records.losses == pytest.approx(wanted.losses, rel=1e-6)  # transformers computes them in fp32
    assert records[0].grad_norm == pytest.approx(wanted[0].grad_norm, rel=1e-9)


def double(model: nn.Module) -> nn.Module:
    """In fp64, without dropout, and with a loss in fp64 where transformers would have it in fp32."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model.double()


@pytest.fixture
def upcasts_keep_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers goes to fp32 in norms and losses, which in fp64 would hide what is compared here."""
    to, softmax = Tensor.to, F.softmax

    def kept(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 and torch.float32 in args else to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", kept)
    monkeypatch.setattr(Tensor, "float", lambda self: self.to(torch.float32))
    monkeypatch.setattr(F, "softmax", lambda input, dim, *_, **__: softmax(input, dim))


LENGTHS = (2, 12, 5, 9)


def ragged(side: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    """Examples of these lengths in one batch, padded on that side; every real token is a label."""
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), 3), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        ids[i, at] = torch.randint(4, zoo.VOCABULARY, (length,), generator=draw)
        mask[i, at] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def split(batch: Mapping[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    parts = {name: tensor.split(sizes) for name, tensor in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]


def causal() -> nn.Module:
    return zoo.build("llama")


def old_causal() -> nn.Module:
    """Its class says nothing of a causal language model, and its loss function is transformers' default."""
    return zoo.build("gpt2")


def unshifted_causal() -> nn.Module:
    """A language model's head with labels that are not shifted: a rule by class names gets it wrong."""
    config = hf.XLNetConfig(vocab_size=zoo.VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return hf.XLNetLMHeadModel(config)


def masked() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**zoo.ENCODER))


def tokens() -> nn.Module:
    return hf.BertForTokenClassification(hf.BertConfig(**zoo.ENCODER, num_labels=zoo.VOCABULARY))


def seq2seq() -> nn.Module:
    return zoo.build("t5")


MODELS = [causal, old_causal, unshifted_causal, masked, tokens, seq2seq]


@pytest.mark.usefixtures("upcasts_keep_double")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3), (3, 1)])
def test_ragged_lengths(make: Callable[[], nn.Module], side: str, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, batch = double(make()), ragged(side)
    if make is tokens or make is masked:  # labels are few, and not where a causal model would count them
        batch["labels"] = batch["labels"].masked_fill(torch.arange(12) % 3 != 2, IGNORED)
        batch["labels"][0, 0 if side == "right" else -1] = 7
    check(model, split(batch, sizes), batch)


@pytest.mark.usefixtures("upcasts_keep_double")
def test_an_adapter_on_a_causal_model() -> None:
    model = lowrank.wrap_model(double(causal()), presets.pissa(rank=2), progress=False)
    batch = ragged("right")
    check(model, split(batch, (1, 3)), batch)


@pytest.mark.usefixtures("upcasts_keep_double")
@pytest.mark.parametrize("make", [causal, masked])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_batch_without_a_counted_label_counts_nothing(make: Callable[[], nn.Module], empty: int) -> None:
    """A causal model counts no first label, so that an example with only that one has none."""
    torch.manual_seed(0)
    model, batch = double(make()), ragged("right", (4, 6, 3))
    batch["labels"][empty] = IGNORED
    if make is causal:
        batch["labels"][empty, 0] = 5
    check(model, split(batch, (1, 1, 1)), batch)


def test_the_last_step_of_an_epoch_is_a_large_batch_too() -> None:
    batch = ragged("right", (4, 9, 3, 7, 2))
    model, history = double(causal()), []
    small = split(batch, (1,) * 5)
    for batches in (small, [*split(batch, (3, 2))]):
        twin = copy.deepcopy(model)
        n = 3 if batches is small else 1
        history.append(fit(twin, batches, accumulate=n, lr=1e-3, warmup=0, progress=False).losses)
    assert history[0] == pytest.approx(history[1], rel=1e-6)


@pytest.mark.parametrize("shape", ["flat", "row"])
def test_packed_documents(shape: str) -> None:
    """Documents in one row, each with its first label ignored, and position ids of a leading size 3."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(zoo.VOCABULARY, zoo.VOCABULARY, dtype=torch.float64)

        def forward(self, position_ids: Tensor, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.table(input_ids.flatten())[:-1]
            return {"loss": F.cross_entropy(logits, labels.flatten()[1:])}

    def packed(*lengths: int) -> dict[str, Tensor]:
        ids = torch.randint(
            zoo.VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths))
        )
        labels = ids.clone()
        labels[torch.tensor((0, *lengths[:-1])).cumsum(0)] = IGNORED
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
        batch = {"position_ids": positions, "input_ids": ids, "labels": labels}
        return batch if shape == "flat" else {name: t.unsqueeze(-2) for name, t in batch.items()}

    torch.manual_seed(0)
    small = [packed(3, 8), packed(2), packed(30, 1, 1)]
    check(Packed(), small, {key: torch.cat([each[key] for each in small], -1) for key in small[0]})


def shifted(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten())


def by_hand(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum") / (labels != IGNORED).sum()


def in_pieces(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    parts = zip(logits.split(4), labels.split(4), strict=True)
    return sum(F.cross_entropy(*part, reduction="sum") for part in parts) / (labels != IGNORED).sum()


def by_class_weight(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
    return nn.CrossEntropyLoss(weight=torch.linspace(0.1, 2, zoo.VOCABULARY).to(logits))(logits, labels)


def log_likelihood(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"]).log_softmax(-1).flatten(0, 1)
    return F.nll_loss(logits, batch["labels"].flatten(), ignore_index=IGNORED)


def another_ignored_label(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, 0).flatten()
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), labels, ignore_index=0)


def unseen(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A kernel of its own: what it counts is read from the batch."""
    labels, logits = batch["labels"], model(batch["input_ids"])
    kept = labels != IGNORED
    return -logits.log_softmax(-1).gather(-1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)[kept].mean()


@pytest.mark.parametrize(
    "loss", [shifted, by_hand, in_pieces, by_class_weight, log_likelihood, another_ignored_label, unseen]
)
def test_a_loss_of_the_users_own(loss: Any) -> None:
    torch.manual_seed(0)
    batch = ragged("right")
    model = nn.Embedding(zoo.VOCABULARY, zoo.VOCABULARY, dtype=torch.float64)
    check(model, split(batch, (1, 3)), batch, loss)


def by_example(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over examples of what each gives on average."""
    labels, logits = batch["labels"], model(batch["input_ids"]).mT
    each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return (each.sum(1) / (labels != IGNORED).sum(1)).mean()


@pytest.mark.parametrize("loss", [by_hand, by_example, shifted])
def test_a_loss_that_averages_by_itself_is_said_to_be_guessed(
    loss: Any, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(notices, "_said", set())
    torch.manual_seed(0)
    batch = ragged("right")
    model = nn.Embedding(zoo.VOCABULARY, zoo.VOCABULARY, dtype=torch.float64)
    if loss is by_example:
        with pytest.raises(AssertionError):
            check(model, split(batch, (1, 3)), batch, loss)
        check(model, split(batch, (1, 3)), batch, loss, weight=lambda batch: len(batch["labels"]))
    else:
        check(model, split(batch, (1, 3)), batch, loss)
    said = [record.getMessage() for record in caplog.records if "averages by itself" in record.getMessage()]
    assert len(said) == (loss is not shifted) and all("pass weight=" in each for each in said)


def test_probabilities_as_targets() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(6, 4).double(), "labels": torch.rand(6, 3).double().softmax(-1)}

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    check(nn.Linear(4, 3).double(), split(batch, (1, 5)), batch, loss)


def test_a_compiled_model() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(zoo.VOCABULARY, zoo.VOCABULARY, dtype=torch.float64)

        def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"loss": shifted(self.table, {"input_ids": input_ids, "labels": labels})}

    torch.manual_seed(0)
    batch = ragged("right")
    check(torch.compile(Shifted(), backend="eager"), split(batch, (1, 3)), batch)


@pytest.mark.usefixtures("upcasts_keep_double")
def test_a_causal_model_with_a_kernel_of_its_own_for_the_loss() -> None:
    def kernel(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
        kept = labels[:, 1:] != IGNORED
        picked = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(0).unsqueeze(-1)).squeeze(-1)
        return -picked[kept].mean()

    model, batch = double(causal()), ragged("right")
    model.loss_function = kernel
    check(model, split(batch, (1, 3)), batch)


@pytest.mark.usefixtures("upcasts_keep_double")
@pytest.mark.parametrize("kind", ["classes", "several", "numbers"])
def test_classifiers_and_regression_count_examples(kind: str) -> None:
    torch.manual_seed(0)
    labels = {
        "classes": torch.tensor([0, 2, 1, 1]),
        "several": torch.randint(2, (4, 3)).double(),
        "numbers": torch.randn(4).double(),
    }[kind]
    config = hf.BertConfig(**zoo.ENCODER, num_labels=1 if kind == "numbers" else 3)
    batch = {**ragged("right"), "labels": labels}
    check(double(hf.BertForSequenceClassification(config)), split(batch, (1, 3)), batch)


@pytest.mark.usefixtures("upcasts_keep_double")
def test_two_losses_of_a_question_answering_model() -> None:
    torch.manual_seed(0)
    batch = ragged("right")
    del batch["labels"]
    batch |= {"start_positions": torch.tensor([0, 4, 1, 2]), "end_positions": torch.tensor([1, 9, 3, 2])}
    check(double(hf.BertForQuestionAnswering(hf.BertConfig(**zoo.ENCODER))), split(batch, (1, 3)), batch)


def test_a_weight_of_the_users_own() -> None:
    torch.manual_seed(0)
    batch = ragged("right")
    model = nn.Embedding(zoo.VOCABULARY, zoo.VOCABULARY, dtype=torch.float64)
    kept = {name: tensor[1:] for name, tensor in batch.items()}
    small = [{name: tensor[:1] for name, tensor in batch.items()}, *split(kept, (1, 2))]

    def weight(batch: Mapping[str, Tensor]) -> float:
        return (
            0.0
            if len(batch["labels"][0]) == 0 or batch["attention_mask"].sum() == 2
            else count_targets(batch)
        )

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        assert batch["attention_mask"].sum() != 2, "a batch that counts 0 was run"
        return log_likelihood(model, batch)

    check(model, small, kept, loss, weight=weight)
    with pytest.raises(ValueError, match=r"weight\(batch\): expected a finite number, zero or more, got -1"):
        fit(model, small, log_likelihood, accumulate=3, weight=lambda batch: -1, progress=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_any_label_updates_nothing_and_says_so(accumulate: int, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = double(causal())
    full = split(ragged("right"), (1,) * 4)
    empty = [{**each, "labels": torch.full_like(each["labels"], IGNORED)} for each in full]
    for each in empty:
        each["labels"][:, 0] = 5  # which the shift leaves out
    states: list[list[Tensor]] = []

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        states.append([parameter.detach().clone() for parameter in model.parameters()])
        return model(**batch).loss

    batches = [*full[:accumulate], *empty[:accumulate], *full[2 : 2 + accumulate]]
    with pytest.warns(UserWarning, match="have no label that the loss counts: it updates nothing"):
        history = fit(model, batches, loss, accumulate=accumulate, progress=False, log=tmp_path / "log.jsonl")
    assert [record.skipped for record in history] == ["", "no labels", ""]
    assert [math.isnan(value) for value in history.losses] == [False, True, False]
    assert History.load(tmp_path / "log.jsonl") == history
    assert all(map(torch.equal, states[accumulate], states[-1])) and not all(
        map(torch.equal, states[0], states[-1])
    )
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="no batch has a label that the loss counts"),
    ):
        fit(model, empty, accumulate=accumulate, progress=False)


def test_counts_of_batches_with_position_ids_and_packed_labels() -> None:
    ids, positions = torch.zeros(2, 5, dtype=torch.long), torch.zeros(3, 2, 5, dtype=torch.long)
    assert count_examples({"position_ids": positions, "input_ids": ids}) == 2
    assert count_tokens({"position_ids": positions, "input_ids": ids}) == 10
    assert count_tokens({"position_ids": positions, "inputs_embeds": torch.zeros(2, 5, 8)}) == 10
    assert count_examples({"position_ids": positions, "inputs_embeds": torch.zeros(2, 5, 8)}) == 2
    assert (
        count_targets({"input_ids": ids.flatten(), "labels": torch.tensor([IGNORED, 1, 2, IGNORED, 3])}) == 3
    )
    assert count_targets({"position_ids": positions, "pixel_values": torch.zeros(2, 3, 4, 4)}) == 2
