"""Of several right ways to compute a product, the fastest on the user's device, found on real calls.

At the first call of each case the candidates are timed on that call's own tensors, and the fastest is used
from then on. What was found is kept for later processes; see `tuning_cache`. Which candidates there are is
for the caller to say. All of them are right, and they differ by rounding only. So processes that work
together may choose differently without harm, and each chooses for itself.

``LOWRANK_TUNE=1`` turns it on. It is off by default: the first candidate alone leaves the base's output bit
for bit, and what the others win in whole steps has not been measured on a GPU.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.layers import tuning_cache
from lowrank.layers.tuning_cache import Found
from lowrank.notices import once

WARM_UP, REPEATS = 3, 9  # calls of each candidate
LONG = 1.0  # seconds; where the warm-up takes longer, each candidate is timed once
WORTH = 0.02  # the share of the first candidate's time that another has to save


def _from_environment() -> bool:
    said = os.environ.get("LOWRANK_TUNE", "")
    if said not in ("", "0", "1"):
        once(f"LOWRANK_TUNE is ignored: expected 0 or 1, got {said!r}")
    return said == "1"


_on = _from_environment()  # read once: os.environ takes a microsecond


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Tuning on or off in this block, whatever ``LOWRANK_TUNE`` says. In all threads."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def allowed() -> bool:
    """May a product be another candidate than the first?

    Not while compiling, nor without grad, nor where PyTorch is to be deterministic. Nor in a dispatch mode:
    fake tensors are not timed, and selective checkpointing needs the same operations each time.
    """
    return (
        _on
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and not torch._C._len_torch_dispatch_stack()
    )


class Case(NamedTuple):
    """What a choice is made for; of the tokens it counts which power of two is the next, 2**tokens."""

    shape: torch.Size  # of the weight, (out, in)
    rank: int
    anchored: bool
    dtype: torch.dtype
    tokens: int
    bias: bool
    contiguous: bool  # the weight
    kinds: tuple[type, type]  # of x and the weight
    device: torch.device

    def __str__(self) -> str:
        words = ["×".join(map(str, self.shape)), f"rank {self.rank}", str(self.dtype).removeprefix("torch.")]
        words += [f"up to {2**self.tokens} tokens"] + ["bias"] * self.bias + ["anchored"] * self.anchored
        return ", ".join(words + ["transposed"] * (not self.contiguous))


def case_of(x: Tensor, weight: Tensor, bias: Tensor | None, rank: int, anchored: bool) -> tuple:
    """The fields of a `Case` as a plain tuple, which is quicker to make: this is done at each call."""
    return (
        weight.shape,
        rank,
        anchored,
        x.dtype,
        (x.shape[:-1].numel() - 1).bit_length(),
        bias is not None,
        weight.is_contiguous(),
        (type(x), type(weight)),
        x.device,
    )


class Tuned:
    """Candidates by name, of which one is chosen for each case; the first is the default.

    Each is called with the same arguments, must not write to them, and returns the same but for rounding.
    """

    def __init__(self, what: str, candidates: Mapping[str, Callable[..., Any]]) -> None:
        self.what, self.candidates = what, dict(candidates)
        self.default = next(iter(self.candidates))
        self.chosen: dict[tuple, str] = {}
        self._deciding = Lock()

    def choice(self, case: tuple, arguments: tuple) -> str:
        """The name of the candidate to use for a case, of which ``arguments`` are a real call.

        The first call of a case runs each candidate some times on them, without a graph, waits for the
        device, and leaves the random state as it was. Later calls look the name up. It never raises.
        """
        return self.chosen.get(case) or self._decided(Case(*case), arguments)

    def _decided(self, case: Case, arguments: tuple) -> str:
        # Another thread that comes meanwhile takes the default and does not wait.
        if not _measurable(case, arguments[0]) or not self._deciding.acquire(blocking=False):
            return self.default
        try:
            found = self._looked_up(case, arguments)
            choice = found.choice
        except Exception as error:
            once(f"tuning of the product for {case} failed, so it is {self.default!r}: {error}", self.what)
            choice = self.default
        finally:
            self._deciding.release()
        self.chosen[case] = choice
        return choice

    def _looked_up(self, case: Case, arguments: tuple) -> Found:
        device, key = device_name(case.device), f"{self.what}, {case}"
        found = tuning_cache.look_up(device, key)
        if found is None or set(found.times) != set(self.candidates):
            times = self._times(arguments, case.device)
            found = Found(times, self._fastest(times))
            # A failure may pass: later processes are to try again.
            tuning_cache.add(device, key, found, on_disk=len(times) == len(self.candidates))
        return found

    def _fastest(self, times: Mapping[str, float]) -> str:
        best = min(times, key=times.__getitem__, default=self.default)
        usual = times.get(self.default)
        return best if usual is None or times[best] < (1 - WORTH) * usual else self.default

    @torch.no_grad()
    def _times(self, arguments: tuple, device: torch.device) -> dict[str, float]:
        """The median seconds of a call of each candidate that does not fail."""
        mark, between = clock_of(device)
        cuda = device.type == "cuda"
        spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in self.candidates}

        def run_all(times: int) -> None:
            for _ in range(times):
                for name in list(spans):  # in turns, so that what else the device does meets all of them
                    start = mark()
                    try:
                        self.candidates[name](*arguments)
                    except Exception as error:
                        del spans[name]
                        text = f"{self.what}: {name!r} failed on {device} and is not used: {error}"
                        once(text, about=(self.what, name))
                    else:
                        spans[name].append((start, mark()))

        with (
            torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type),
            torch.cuda.device(device) if cuda else nullcontext(),
        ):
            start = mark()
            run_all(WARM_UP)
            # This waits for the device. From an empty queue on, what it costs to launch shows in the times.
            repeats = REPEATS if between(start, mark()) < LONG else 1
            for taken in spans.values():
                taken.clear()
            run_all(repeats)
            return {name: median(between(*span) for span in taken) for name, taken in spans.items()}


def clock_of(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks a moment on the device, and the seconds between two marks, which may wait for the second."""
    if device.type == "cuda":

        def record() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return record, between

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now, lambda start, end: end - start


def _measurable(case: Case, x: Tensor) -> bool:
    """Can a call with this x be timed? Not where it holds nothing, or records what is done."""
    plain = all(kind in (Tensor, torch.nn.Parameter) for kind in case.kinds)
    if not plain or not x.numel() or case.device.type == "meta" or torch.jit.is_tracing():
        return False
    return case.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def device_name(device: torch.device) -> str:
    """What timings depend on: the name of a GPU, or that of the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type}, {platform.platform()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
