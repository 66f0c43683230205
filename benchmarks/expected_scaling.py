"""What several processes would gain, computed and not measured: `python benchmarks/expected_scaling.py`.

Under DDP a step sends the adapters' gradients only. A ring all-reduce of G bytes over n processes takes
2·(n − 1)/n · G / bandwidth on each link, after the step's computation and not beside it, as in `fit`.
"""

from __future__ import annotations

from collections.abc import Iterator

LAYERS, HIDDEN, INNER, KEYS = 32, 4096, 14336, 1024  # of an 8B Llama
SHAPES = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEYS)] * 2 + [(HIDDEN, INNER)] * 3  # (in, out), either way round
LINKS = {"NVLink, 300 GB/s": 300e9, "InfiniBand, 25 GB/s": 25e9, "Ethernet 10 Gb/s, 1.25 GB/s": 1.25e9}


def gradient_bytes(rank: int) -> int:
    """fp32 gradients of LoRA of ``rank`` on all projections."""
    return 4 * LAYERS * sum(rank * (inside + out) for inside, out in SHAPES)


def efficiency(processes: int, size: float, bandwidth: float, step_seconds: float) -> float:
    """The share of a linear speed-up that is left."""
    sent = 2 * (processes - 1) / processes * size / bandwidth
    return step_seconds / (step_seconds + sent)


def table(rank: int = 16, step_seconds: float = 1.0) -> Iterator[str]:
    """Rows of Markdown."""
    size = gradient_bytes(rank)
    yield f"Computed: 8B Llama, rank {rank}, {size / 1e6:.0f} MB of gradients, a step of {step_seconds} s."
    yield ""
    yield "| link | 2 processes | 8 | 64 |"
    yield "|---|---|---|---|"
    for name, bandwidth in LINKS.items():
        shares = [efficiency(n, size, bandwidth, step_seconds) for n in (2, 8, 64)]
        yield f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |"


if __name__ == "__main__":
    print("\n".join(table()))
