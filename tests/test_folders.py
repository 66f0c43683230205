"""Writing: nothing of others is deleted or overwritten, and a crash leaves the old adapter or the new one.

What an adapter trains, and how it was started, is stored with it and is no condition of loading it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
import stat
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Plan, presets
from lowrank.files import replacing, write
from lowrank.formats.folder import CONFIG, checksum
from lowrank.init import ByRole, Factors, Kaiming
from lowrank.models.projections import Role
from lowrank.train.history import History, Record
from tests import zoo
from tests.helpers import perturb

PEFT = "adapter_config.json", "adapter_model.safetensors"
X = torch.linspace(-1, 1, 24).view(4, 6)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "head": nn.Linear(6, 2)})


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model["head"](model["down"](model["up"](X)))


def wrapped(size: float = 0.1, **options: Any) -> nn.Module:
    options = {"rank": 2, "target": ("up", "down"), **options}
    return perturb(lowrank.wrap_model(net(), presets.pissa(**options), progress=False), size)


def tensors_file(folder: Path) -> Path:
    return folder / json.loads((folder / CONFIG).read_text())["tensors"]


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# -- what others have put there -----------------------------------------------------------------------


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "adapter-mine.safetensors").write_bytes(b"mine")
    (tmp_path / "adapter-0123456789abcdef.safetensors").write_bytes(b"mine, too")
    lowrank.save_adapter(wrapped(), tmp_path)
    old = tensors_file(tmp_path)
    lowrank.save_adapter(wrapped(0.2), tmp_path)
    assert not old.exists()
    mine = {"adapter-mine.safetensors", "adapter-0123456789abcdef.safetensors"}
    assert names(tmp_path) == mine | {CONFIG, tensors_file(tmp_path).name}


@pytest.mark.parametrize(
    "damage",
    [
        lambda config: config.update(tensors="mine.safetensors"),
        lambda config: config.update(tensors="adapter-0123456789abcdef.safetensors"),
        lambda config: config.update(tensors="../adapter-mine.safetensors"),
        lambda config: config.update(sha256=3),
    ],
)
def test_a_file_that_a_forged_configuration_names_stays(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    lowrank.save_adapter(wrapped(), folder)
    for path in ("mine.safetensors", "adapter-0123456789abcdef.safetensors", "../adapter-mine.safetensors"):
        (folder / path).write_bytes(b"mine")
    before = names(folder) | names(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    damage(config)
    config["checksum"] = checksum(config)
    (folder / CONFIG).write_text(json.dumps(config))
    lowrank.save_adapter(wrapped(0.2), folder)
    assert before <= names(folder) | names(tmp_path)


def test_an_unreadable_configuration_lets_nothing_be_deleted(tmp_path: Path) -> None:
    lowrank.save_adapter(wrapped(), tmp_path)
    old = tensors_file(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    lowrank.save_adapter(wrapped(0.2), tmp_path)
    assert old.exists()


# -- links, leftovers, permissions --------------------------------------------------------------------

STATISTICS = lowrank.measure(
    zoo.build("perceptron"), presets.tlora(rank=2), [zoo.batch("perceptron")], progress=False
)

WRITERS: dict[str, Callable[[Path], Any]] = {
    "write": lambda path: write(path, b"content"),
    "plan": lambda path: lowrank.plan_of(wrapped()).save(path),
    "history": lambda path: History([Record(1, 1, 0.5, 1e-3, 1.0, 10.0, 1.0)]).save(path),
    "statistics": lambda path: STATISTICS.save(path),
    "adapter": lambda path: lowrank.save_adapter(wrapped(), path),
    "peft": lambda path: lowrank.export_peft(wrapped(), path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_planted_links_and_leftovers(writer: str, tmp_path: Path) -> None:
    """Links under names that temporary files might have, such as the process's id."""
    victim, target = tmp_path / "victim", tmp_path / "folder" / "target"
    victim.write_bytes(b"precious")
    target.parent.mkdir()
    folders = [tmp_path / "folder"]
    if writer in ("adapter", "peft"):
        target.mkdir()
        folders.append(target)
    for folder in folders:
        for name in ("target", CONFIG, *PEFT):
            for planted in (f".{name}.{os.getpid()}", f".{name}.tmp", f"{name}.tmp"):
                (folder / planted).symlink_to(victim)
    WRITERS[writer](target)
    assert victim.read_bytes() == b"precious"
    WRITERS[writer](target)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("writer", [*WRITERS])
def test_a_link_at_the_path_itself_is_replaced(writer: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    if writer in ("adapter", "peft"):
        (tmp_path / "target").mkdir()
        for name in PEFT if writer == "peft" else [CONFIG]:
            (tmp_path / "target" / name).symlink_to(victim)
    else:
        (tmp_path / "target").symlink_to(victim)
    WRITERS[writer](tmp_path / "target")
    assert victim.read_bytes() == b"precious"
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("writer", WRITERS)
def test_permissions_are_those_of_any_new_file(writer: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for _ in range(2):
            WRITERS[writer](tmp_path / "target")
    finally:
        os.umask(before)
    paths = [tmp_path / "target", *tmp_path.rglob("target/*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o640}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} <= {0o750}


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failure_leaves_what_was_there(
    writer: str, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    WRITERS[writer](tmp_path / "target")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        WRITERS[writer](tmp_path / "target")
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    WRITERS[writer](tmp_path / "target")


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"), replacing(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(writer: str, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's."""
    WRITERS[writer](tmp_path / "target")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(Exception, match="too large"):  # SafetensorError, where it is their writer's
            WRITERS[writer](tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    lowrank.save_adapter(wrapped(), tmp_path)
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        lowrank.save_adapter(wrapped(0.2), tmp_path)
    tmp_path.chmod(0o755)


# -- crashes ------------------------------------------------------------------------------------------

ACTIONS = ("replace", "link", "unlink", "symlink", "fsync", "mkdir", "rmdir", "open")


class Stop(BaseException):
    """The process ends."""


def crash(monkeypatch: pytest.MonkeyPatch, save: Callable[[], Any], at: int) -> bool:
    """Calls ``save`` in a process that ends at its ``at``-th action on files: none works from then on.

    False where it was done before.
    """
    count = 0

    def ending(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= at:
                raise Stop
            return action(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ACTIONS:
            patch.setattr(os, name, ending(getattr(os, name)))
        try:
            save()
        except Stop:
            return True
    return False


CRASHES: dict[str, tuple[str, str, bool]] = {
    "ours": ("save_adapter", "load_adapter", True),
    "peft": ("export_peft", "import_peft", True),
    "peft, no hard links": ("export_peft", "import_peft", False),
}


@pytest.mark.parametrize("case", CRASHES)
def test_a_crash_anywhere_leaves_the_old_adapter_or_the_new_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, load, linking = CRASHES[case]
    if not linking:
        monkeypatch.setattr(os, "link", refuse)
    old, new = wrapped(), wrapped(0.2, rank=4)
    wanted = [output(old), output(new)]
    assert not torch.allclose(*wanted, rtol=1e-2)
    getattr(lowrank, save)(old, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    seen, at, stopped = [], 0, True
    while stopped:
        at += 1
        getattr(lowrank, save)(old, tmp_path)
        stopped = crash(monkeypatch, lambda: getattr(lowrank, save)(new, tmp_path), at)
        got = output(getattr(lowrank, load)(net(), tmp_path))
        same = [torch.allclose(got, each, rtol=1e-5, atol=1e-6) for each in wanted]
        assert same.count(True) == 1 and (tmp_path / "README.md").read_text() == "kept"
        seen.append(same.index(True))
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1 and len(seen) > 8
    written = set(PEFT) if "peft" in case else {CONFIG}
    assert not any((tmp_path / name).is_symlink() for name in written)


def refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EPERM, "not here")


@pytest.mark.parametrize("missing", ["symlink", "link"])
def test_exporting_without_links_of_some_kind(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowrank.export_peft(wrapped(), tmp_path)
    monkeypatch.setattr(os, missing, refuse)
    model = wrapped(0.2, rank=4)
    lowrank.export_peft(model, tmp_path)
    assert names(tmp_path) == set(PEFT)
    torch.testing.assert_close(output(lowrank.import_peft(net(), tmp_path)), output(model))


def test_an_export_after_a_crash_leaves_plain_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowrank.export_peft(wrapped(), tmp_path / "adapter")
    for at in range(1, 60):
        crash(monkeypatch, lambda: lowrank.export_peft(wrapped(0.2), tmp_path / "adapter"), at)
    model = wrapped(0.3, rank=4)
    lowrank.export_peft(model, tmp_path / "adapter")
    assert all((tmp_path / "adapter" / name).is_file() for name in PEFT)
    assert not any((tmp_path / "adapter" / name).is_symlink() for name in PEFT)
    torch.testing.assert_close(output(lowrank.import_peft(net(), tmp_path / "adapter")), output(model))


# -- what an adapter trains ---------------------------------------------------------------------------


def tlora() -> nn.Module:
    """Query adapters with a frozen A among others."""
    batches = [zoo.batch("llama")]
    return perturb(
        lowrank.wrap_model(zoo.build("llama"), presets.tlora(rank=2), batches=batches, progress=False)
    )


def test_an_adapter_of_a_frozen_model_loads_and_trains(tmp_path: Path) -> None:
    model = tlora()
    count = sum(p.numel() for p in lowrank.adapter_parameters(model))
    assert count == lowrank.plan_of(model).trainable_parameters
    every = {name for name, p in model.named_parameters() if p.requires_grad}
    lowrank.save_adapter(model, tmp_path / "training")
    model.requires_grad_(False)
    assert sum(p.numel() for p in lowrank.adapter_parameters(model)) == count
    lowrank.save_adapter(model, tmp_path / "frozen")
    assert (tmp_path / "frozen" / CONFIG).read_bytes() == (tmp_path / "training" / CONFIG).read_bytes()
    again = lowrank.load_adapter(zoo.build("llama").requires_grad_(False), tmp_path / "frozen")
    assert {name for name, p in again.named_parameters() if p.requires_grad} == every


@pytest.mark.parametrize(
    "copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_know_what_they_train(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = tlora().requires_grad_(False)
    shapes = [p.shape for p in lowrank.adapter_parameters(model)]
    assert [p.shape for p in lowrank.adapter_parameters(copied(model))] == shapes and shapes


# -- how it was started -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparse:
    """An initializer of somebody else."""

    density: float = 0.5
    needs: frozenset[str] = frozenset()

    def __call__(self, weight: Tensor, rank: int, scaling: float, **rest: Any) -> Factors:
        A = torch.ones(rank, weight.shape[1]) * self.density
        return Factors(A, torch.zeros(weight.shape[0], rank))


class Unprintable(Sparse):
    def __repr__(self) -> str:
        raise RuntimeError("not today")


INITS: dict[str, Any] = {
    "theirs": Sparse(),
    "theirs by role": ByRole({Role.UP: Sparse(0.25)}, otherwise=Kaiming()),
    "unprintable": Unprintable(),
}


@pytest.mark.parametrize("case", INITS)
def test_an_initializer_of_somebody_else(case: str, tmp_path: Path) -> None:
    model = perturb(
        lowrank.wrap_model(net(), presets.lora(rank=2, target="up", init=INITS[case]), progress=False)
    )
    lowrank.save_adapter(model, tmp_path / "once")
    again = lowrank.load_adapter(net(), tmp_path / "once")
    assert torch.equal(output(again), output(model))
    lowrank.save_adapter(again, tmp_path / "twice")
    assert (tmp_path / "once" / CONFIG).read_bytes() == (tmp_path / "twice" / CONFIG).read_bytes()
    plan = lowrank.plan_of(again)
    assert "Sparse" in repr(plan.init) or "Unprintable" in repr(plan.init)
    plan.save(tmp_path / "plan.json")
    base = net()
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match="initializer .* cannot be made here.*set another"):
        lowrank.wrap_model(base, Plan.load(tmp_path / "plan.json"))
    assert dict(base.named_modules()) == modules
    plan.init = Kaiming()
    lowrank.wrap_model(base, plan)


def test_an_initializer_of_somebody_else_for_a_role_that_is_not_there(tmp_path: Path) -> None:
    init = ByRole({Role.QUERY: Sparse()}, otherwise=Kaiming())
    plan = lowrank.plan_model(net(), presets.lora(rank=2, target="up", init=init), progress=False)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json()
    assert lowrank.adapted_layers(lowrank.wrap_model(net(), again, progress=False))


RENAMED: list[Any] = [
    {"class": "Principal", "fields": {"iterations": 3}},
    {"class": "Telepathic", "fields": {"depth": 2}},
    {
        "class": "ByRole",
        "fields": {"parts": {"mapping": [[{"role": "hyper"}, {"class": "X", "fields": {}}]]}},
    },
    {"class": "Kaiming"},
]


@pytest.mark.parametrize("record", RENAMED)
def test_an_initializer_of_another_version(record: Any, tmp_path: Path) -> None:
    model = wrapped()
    lowrank.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["plan"]["init"] = record
    config["checksum"] = checksum(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    again = lowrank.load_adapter(net(), tmp_path)
    assert torch.equal(output(again), output(model))
    plan = lowrank.plan_of(again)
    assert plan.to_json()["init"] == record and record["class"] in repr(plan.init)
    with pytest.raises(ValueError, match=f"{record['class']}.* cannot be made here"):
        lowrank.wrap_model(net(), plan)


# -- modules trained in full --------------------------------------------------------------------------


def test_replaced_modules_are_named_and_can_be_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = wrapped(train=("head",))
    lowrank.save_adapter(model, tmp_path)
    with caplog.at_level(logging.INFO, "lowrank"):
        assert torch.equal(output(lowrank.load_adapter(net(), tmp_path)), output(model))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} replaces these modules in full: head"
    ]
    caplog.clear()
    base = net()
    base["head"] = nn.Linear(6, 3)
    head = base["head"]
    lowrank.load_adapter(base, tmp_path, train=False)
    assert base["head"] is head and lowrank.plan_of(base).train == () and not caplog.records
    assert torch.equal(base["up"].delta_weight(), model["up"].delta_weight())


def test_a_path_that_cannot_be_is_said_in_words(tmp_path: Path) -> None:
    model = wrapped()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"file is a file: name a folder$"):
            lowrank.save_adapter(model, path)
    with pytest.raises(FileNotFoundError, match=r"plan\.json cannot be written: there is no folder .*none$"):
        lowrank.plan_of(model).save(tmp_path / "none" / "plan.json")
