"""How the benchmarks measure: interleaved steps, bytes kept for backward, peak memory, and where it ran.

It knows nothing of what is measured. Results are given as plain data; each script lays out its own tables.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

Step = Callable[[int], object]
"""One forward and backward; its argument counts the rounds, so that it can rotate its inputs."""


@dataclass(frozen=True)
class Times:
    """Seconds of the repeats of one contender, sorted."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        return self.seconds[min(int(share * len(self.seconds)), len(self.seconds) - 1)]


def interleaved(
    steps: Mapping[str, Step], *, warmups: int, repeats: int, device: str, after: Callable[[], object]
) -> dict[str, Times]:
    """Times of all steps, one of each a round, in an order drawn each round; `after` each is not timed."""
    order, draw = list(steps), random.Random(0)
    taken: dict[str, list] = {name: [] for name in steps}
    for index in range(warmups + repeats):
        draw.shuffle(order)
        for name in order:
            timed = _cuda_timed if device == "cuda" else _cpu_timed
            mark = timed(steps[name], index)
            after()
            if index >= warmups:
                taken[name].append(mark)
    if device == "cuda":
        torch.cuda.synchronize()
        taken = {name: [a.elapsed_time(b) / 1e3 for a, b in marks] for name, marks in taken.items()}
    return {name: Times(tuple(sorted(seconds))) for name, seconds in taken.items()}


def _cpu_timed(step: Step, index: int) -> float:
    """With one thread its own processor time, which other processes on a shared machine change little."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step(index)
    return clock() - start


def _cuda_timed(step: Step, index: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step(index)
    end.record()
    return start, end


def kept_bytes(forward: Callable[[], object], alive: Iterable[Tensor]) -> int:
    """Bytes of the storages that backward keeps beyond those of `alive` (weights, factors), each once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in alive}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())


def peak_bytes(step: Step, device: str) -> int | None:
    """What one step allocates at most beyond what was allocated before it; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def surroundings(device: str) -> dict[str, str]:
    """Device, date, versions and command, for the head of a result."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "peft")},
    }
    if device == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["clocks"] = clocks()
    else:
        facts["clock"] = "processor time of the thread" if torch.get_num_threads() == 1 else "wall"
        facts["load average at the end"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def clocks() -> str:
    """SM and memory clocks, temperature and power as nvidia-smi gives them, or why it does not."""
    query = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known ({type(error).__name__})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
