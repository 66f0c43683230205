"""Puts the two files of a PEFT folder in the place of older ones, in one step. It knows no content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.files import make_folder, sync, unused_name

CONFIG, TENSORS = FILES = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder to write to: its files are those of ``path`` in the end, and disappear on an error.

    Where ``path`` is there already, the two files of an adapter are replaced in one step and the rest stays:
    at every moment, also after a crash, ``path`` holds the old adapter or the new one.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    existing = next(each for each in (path, *path.parents) if each.is_dir())
    room = unused_name(existing / path.name)
    new = room / "new"
    room.mkdir()
    try:
        new.mkdir()
        yield new
        if existing == path:
            _exchange(path, room)
        else:
            make_folder(path.parent)
            os.replace(new, path)
            sync(path.parent)
    finally:
        if not any(_leads_into(path / name, room) for name in FILES):
            shutil.rmtree(room, ignore_errors=True)


def _exchange(path: Path, room: Path) -> None:
    """The files of ``room``/new take the place of those of ``path``, all at once.

    Two files cannot be renamed in one step, but a link that both go through can. They become links to
    ``room``/now, which points to the old files and after one rename to the new ones; then files again.
    """
    old, new, now = room / "old", room / "new", room / "now"
    old.mkdir()
    for name in FILES:
        if (path / name).exists():
            _copy(path / name, old / name)
    try:
        now.symlink_to("old")
    except (OSError, NotImplementedError):  # without a configuration in between there is no mixture either
        (path / CONFIG).unlink(missing_ok=True)
        os.replace(new / TENSORS, path / TENSORS)
        os.replace(new / CONFIG, path / CONFIG)
        return
    sync(room)
    try:
        for name in FILES:
            _link(path / name, f"{room.name}/now/{name}")
        sync(path)
        _link(now, "new")
        sync(room)
    finally:
        for name in FILES:
            if _leads_into(path / name, room):
                _settle(path / name)
        sync(path)


def _link(path: Path, target: str) -> None:
    """A symbolic link at ``path``, in the place of what was there."""
    temporary = unused_name(path)
    temporary.symlink_to(target)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """The file that the link ``path`` leads to, in the place of the link."""
    if not path.exists():
        return path.unlink()
    temporary = unused_name(path)
    try:
        _copy(path.resolve(), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """The same content under another name."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        sync(target)


def _leads_into(path: Path, folder: Path) -> bool:
    return path.is_symlink() and path.resolve().is_relative_to(folder.resolve())
