"""One run at a time in a folder of checkpoints: a second one would delete what the first is writing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.train.checkpoints import CheckpointError

NAME = ".lock"


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Inside, no other process can enter this for ``folder``, which is there. It ends with the process.

    Raises CheckpointError where another process is inside. Where the system or the file system has no locks,
    nothing is checked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder / NAME
    while True:
        file = path.open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise CheckpointError(
                f"another run is using the checkpoints in {folder}: wait for its end, or name another folder"
            ) from error
        except OSError:
            break  # no locks here
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the run before has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
