"""How the benchmarks measure: interleaved steps, bytes kept for backward, peak memory, and where it ran.

It knows nothing of what is measured. Results are given as plain data; each script lays out its own tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Step = Callable[[int], object]
"""One forward and backward; its argument counts the rounds, so that it can rotate its inputs."""


@dataclass(frozen=True)
class Times:
    """Seconds of the repeats of one contender, sorted; `undisturbed` if no other process got in between."""

    seconds: tuple[float, ...]
    undisturbed: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        return self.seconds[min(int(share * len(self.seconds)), len(self.seconds) - 1)]


def interleaved(
    steps: Mapping[str, Step],
    *,
    warmups: int,
    repeats: int,
    device: str,
    after: Callable[[], object],
    patience: float = 0,
) -> dict[str, Times]:
    """Times of all steps, one of each a round, in an order drawn each round; `after` each is not timed.

    On a CPU that others use too, it goes on for `patience` seconds more until each step has been run
    `repeats` times without the process being preempted, and then only those count.
    """
    if device == "cuda":
        return _cuda_interleaved(steps, warmups, repeats, after)
    for _, step in _rounds(steps, warmups):
        _cpu_timed(step, 0)
        after()
    everything: dict[str, list[float]] = {name: [] for name in steps}
    clean: dict[str, list[float]] = {name: [] for name in steps}
    started, index = time.monotonic(), 0
    while index < repeats or (
        min(map(len, clean.values())) < repeats and time.monotonic() - started < patience
    ):
        for name, step in _rounds(steps, 1, seed=index):
            seconds, alone = _cpu_timed(step, index)
            after()
            everything[name].append(seconds)
            if alone:
                clean[name].append(seconds)
        index += 1
    undisturbed = min(map(len, clean.values())) >= max(1, repeats // 2)
    taken = clean if undisturbed else everything
    return {name: Times(tuple(sorted(seconds)), undisturbed) for name, seconds in taken.items()}


def _rounds(steps: Mapping[str, Step], rounds: int, seed: int = 0) -> Iterator[tuple[str, Step]]:
    order, draw = list(steps), random.Random(seed)
    for _ in range(rounds):
        draw.shuffle(order)
        yield from ((name, steps[name]) for name in order)


def _cpu_timed(step: Step, index: int) -> tuple[float, bool]:
    """Seconds, and whether the process kept its processors. With one thread they are its processor time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = clock()
    step(index)
    seconds = clock() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == preempted


def _cuda_interleaved(
    steps: Mapping[str, Step], warmups: int, repeats: int, after: Callable[[], object]
) -> dict[str, Times]:
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for index in range(warmups + repeats):
        for name, step in _rounds(steps, 1, seed=index):
            pair = _cuda_timed(step, index)
            after()
            if index >= warmups:
                marks[name].append(pair)
    torch.cuda.synchronize()
    seconds = {name: sorted(a.elapsed_time(b) / 1e3 for a, b in pairs) for name, pairs in marks.items()}
    return {name: Times(tuple(values), True) for name, values in seconds.items()}


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


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most that torch's allocator holds during a run, beyond what it held before.

    On a CPU that is summed from the profiler's allocations, without the scratch space inside operations.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Resident(NamedTuple):
    """What a run took: its result, seconds, and MiB that the process held before it and at most in it."""

    result: Any
    seconds: float
    before: float
    most: float


def resident(run: Callable[[], Any]) -> Resident:
    """One run, by the clock of `surroundings`; the memory is what is resident (Linux only, else 0)."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # the peak starts again from here
    before, start = _resident("VmRSS"), clock()
    result = run()
    return Resident(result, clock() - start, before, _resident("VmHWM"))


def _resident(key: str) -> float:
    if not _STATUS.exists():
        return 0.0
    return next(
        int(line.split()[1]) / 1024 for line in _STATUS.read_text().splitlines() if line.startswith(key)
    )


def verdict(value: float, aim: float | None, unit: str = "") -> str:
    """The target, and whether a figure meets it: at most `aim`. Floors come negated, with their figures."""
    if aim is None:
        return "–"
    return f"{'≥' if aim < 0 else '≤'} {abs(aim):g}{unit} {'met' if value <= aim else 'missed'}"


def result_name(kind: str, options: argparse.Namespace, part: str = "") -> str:
    """The name of a result's files: what was measured, where, and with which options."""
    threads = f"threads-{options.threads}" if options.threads else ""
    return "-".join(filter(None, [kind, options.device, threads, part, "quick" if options.quick else ""]))


def write_results(folder: Path, name: str, report: str, data: Any) -> None:
    """Writes ``report`` to ``name``.md and ``data``, which may hold data classes, to ``name``.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(report)
    text = json.dumps(data, indent=1, ensure_ascii=False, default=asdict)
    (folder / f"{name}.json").write_text(text + "\n")


def surroundings(device: str) -> dict[str, str]:
    """Device, date, versions and command, for the head of a result."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
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


def _commit() -> str:
    """The checkout's commit, with a plus sign where files differ from it."""
    try:
        where = ["git", "-C", os.path.dirname(__file__) or "."]
        told = [
            subprocess.run([*where, *rest], capture_output=True, text=True, check=True).stdout.strip()
            for rest in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
        return told[0] + "+" * bool(told[1])
    except (OSError, subprocess.SubprocessError):
        return "not known"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
