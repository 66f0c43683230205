"""Pictures of what was planned and of how training went, all in one look. The only file that draws.

Lines differ in style as well as in colour, and colours in lightness: they can be told apart in grey and by
people who are colour-blind. Needs matplotlib, ``pip install lowrank-torch[plots]``, from the first call on.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

# Okabe and Ito's colours (2008), from dark to light.
LINES = (
    ("#000000", "-"),
    ("#0072B2", "--"),
    ("#D55E00", "-."),
    ("#E69F00", ":"),
    ("#56B4E9", (0, (5, 1, 1, 1))),
)
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
}


def curves(
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]],
    path: str | PathLike[str] | None = None,
    *,
    xlabel: str = "step",
    title: str = "",
) -> Any:
    """One panel below the other, each with a label and its lines: name → (x, y). Returns the figure.

    It is written to ``path``, whose ending says the format, where there is one.
    """
    pyplot, style = _pyplot()
    with style:
        height = 1.0 + 2.2 * len(panels)
        figure, axes = pyplot.subplots(
            len(panels), 1, sharex=True, squeeze=False, figsize=(7, height), layout="constrained"
        )
        for axis, (label, lines) in zip(axes[:, 0], panels, strict=True):
            for i, (name, (x, y)) in enumerate(lines.items()):
                color, line = LINES[i % len(LINES)]
                axis.plot(x, y, color=color, linestyle=line, label=name, marker="o" if len(x) == 1 else None)
            axis.set_ylabel(label)
            if len(lines) > 1:
                axis.legend()
        axes[-1, 0].set_xlabel(xlabel)
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].set_title(title, loc="left")
        return _written(pyplot, figure, path)


def heat_map(
    cells: Sequence[Sequence[int | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | PathLike[str] | None = None,
    *,
    title: str = "",
    xlabel: str = "",
    signed: bool = False,
) -> Any:
    """Numbers as lightness, each written in its cell where there is room; None is left empty.

    With ``signed`` they are differences: two hues on both sides of white, and a sign in each cell.
    Returns the figure, and writes it to ``path`` where there is one.
    """
    pyplot, style = _pyplot()
    with style, pyplot.rc_context({"axes.grid": False}):
        width = max(6.0, 1.8 + 0.45 * len(columns))
        figure, axis = pyplot.subplots(figsize=(min(width, 24), 1.4 + 0.4 * len(rows)), layout="constrained")
        values = [[float("nan") if cell is None else float(cell) for cell in row] for row in cells]
        most = max((cell for row in cells for cell in row if cell is not None), default=0)
        if signed:
            most = max((abs(cell) for row in cells for cell in row if cell is not None), default=0)
        colors, low = ("PuOr", -max(most, 1)) if signed else ("cividis_r", 0)
        image = axis.imshow(values, aspect="auto", cmap=colors, vmin=low, vmax=max(most, 1))
        axis.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel=xlabel)
        axis.set_xticklabels(columns)
        axis.set_yticklabels(rows)
        axis.set_title(title, loc="left", wrap=True)
        if len(columns) <= 48:
            for y, row in enumerate(cells):
                for x, cell in enumerate(row):
                    if cell is not None:
                        color = "white" if abs(cell) > most / 2 else "black"
                        text = f"{cell:+d}" if signed and cell else str(cell)
                        axis.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, ax=axis, label="difference of ranks" if signed else "rank")
        return _written(pyplot, figure, path)


def by_layer(
    cells: Mapping[tuple[str, str], int],
    path: str | PathLike[str] | None = None,
    *,
    title: str = "",
    signed: bool = False,
) -> Any:
    """`heat_map` of numbers by (role, layer): layers in their order, the one called "–" last."""
    roles = list(dict.fromkeys(role for role, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (layer == "–", len(layer), layer))
    rows = [[cells.get((role, layer)) for layer in layers] for role in roles]
    return heat_map(rows, roles, layers, path, title=title, xlabel="layer", signed=signed)


def spectra(
    rows: Mapping[str, Sequence[tuple[str, Sequence[float], int]]],
    path: str | PathLike[str] | None = None,
    *,
    title: str = "",
    lines: str = "layer",
) -> Any:
    """Two panels for each label: singular values beside the largest, and the share that the first k hold.

    The share is that of the squares: of a matrix's squared norm, or of a variance. A line is its name, its
    singular values in descending order, and the k that a dot marks, 0 for none. Lines get lighter from the
    first to the last and differ in style; the legend names six at most. ``lines`` is what a line stands for.
    Returns the figure, and writes it to ``path`` where there is one.
    """
    pyplot, style = _pyplot()
    with style:
        size = (9, 1.0 + 2.0 * len(rows))
        figure, axes = pyplot.subplots(
            len(rows), 2, sharex=True, squeeze=False, figsize=size, layout="constrained"
        )
        for (left, right), (label, drawn) in zip(axes, rows.items(), strict=True):
            last = max(1, len(drawn) - 1)
            named = {round(i * last / 5) for i in range(6)}
            for i, (name, values, marked) in enumerate(drawn):
                look = {
                    "color": pyplot.get_cmap("cividis")(0.85 * i / last),
                    "linestyle": LINES[i % len(LINES)][1],
                    "label": name if i in named else None,
                }
                shown = _spread(len(values), marked)
                squares = list(accumulate(value**2 for value in values))
                shares = [square / squares[-1] for square in squares]
                left.plot(shown, [values[k - 1] / values[0] or float("nan") for k in shown], **look)
                right.plot(shown, [shares[k - 1] for k in shown], **look)
                if marked:
                    right.plot([marked], [shares[marked - 1]], "o", color=look["color"], markersize=5)
            left.set(yscale="log", ylabel=f"{label}\n" + r"$\sigma_k\,/\,\sigma_1$")
            right.set(ylim=(0, 1.03), ylabel="share of the first k")
            right.legend(title=lines, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis in axes[-1]:
            axis.set_xscale("log", base=2)
            axis.set_xlabel("k")
            axis.xaxis.set_major_formatter("{x:g}")
        axes[0, 0].set_title(title, loc="left", wrap=True)
        return _written(pyplot, figure, path)


def _spread(count: int, marked: int) -> list[int]:
    """Up to 200 numbers from 1 to ``count``, evenly on a logarithmic axis, and the one that is marked."""
    return sorted({round(count ** (i / 199)) for i in range(200)} | ({marked} if marked else set()))


def _pyplot() -> tuple[Any, Any]:
    """matplotlib, which is looked for only now, and the look of all pictures here."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lowrank-torch[plots]'") from error
    return pyplot, pyplot.rc_context(STYLE)


def _written(pyplot: Any, figure: Any, path: str | PathLike[str] | None) -> Any:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)  # which else keeps it for good
    return figure
