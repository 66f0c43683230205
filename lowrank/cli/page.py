"""The report's HTML: one page that loads nothing, for light and dark, wide and narrow screens.

It knows headings, tables and pictures, and not what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #222; --back: #fff; --soft: #f3f3f3; --line: #ccc }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --back: #1b1b1d; --soft: #2a2a2d; --line: #555 }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: var(--text); background: var(--back) }
h1, td, p, li { overflow-wrap: anywhere }
table { border-collapse: collapse }
td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
.wide { overflow-x: auto; max-height: 40em; border: 1px solid var(--line) }
.wide table { font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap }
.wide th { position: sticky; top: 0; background: var(--soft); padding: 0 }
.wide td { padding: .1em .8em; overflow-wrap: normal }
.wide button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0;
               padding: .3em .8em; cursor: pointer }
th[aria-sort=ascending] button::after { content: " ▲" }
th[aria-sort=descending] button::after { content: " ▼" }
pre { overflow-x: auto; background: var(--soft); padding: 1em; font-size: 13px }
svg { max-width: 100%; height: auto; background: #fff }
"""

# A click on a heading sorts by that column, another one the other way round: numbers by size, then words.
SCRIPT = """
const number = text => { const n = parseFloat(text.replaceAll(",", "")); return isNaN(n) ? Infinity : n };
const compare = (a, b) => (number(a) - number(b)) || a.localeCompare(b, undefined, { numeric: true });
for (const table of document.querySelectorAll(".wide table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const text = row => row.cells[column].textContent;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => sign * compare(text(a), text(b))));
  }));
}
"""


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page: ``title``, then sections of a heading ("" for none) and HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    parts = [f"<h1>{escape(title)}</h1>"]
    for heading, html in sections:
        parts += [f"<h2>{escape(heading)}</h2>"] * bool(heading) + [html]
    body = "\n".join([*parts, f"<script>{SCRIPT}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def facts(found: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in found.items()
    )
    return f"<table>{''.join(rows)}</table>"


def cells(lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns sort by a click; the first of ``lines`` is the header."""
    header, *rows = lines
    head = "".join(f'<th scope="col"><button type="button">{escape(each)}</button></th>' for each in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(each)}</td>" for each in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def text(lines: str) -> str:
    """Text that is laid out by its spaces, as printed tables are."""
    return f'<pre tabindex="0">{escape(lines)}</pre>'


def items(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def picture(figure: Any, label: str) -> str:
    """A figure of matplotlib as part of the page; ``label`` says what it shows to those who do not see it."""
    from matplotlib import pyplot

    written = StringIO()
    figure.savefig(written, format="svg")
    pyplot.close(figure)
    _, _, svg = written.getvalue().partition("<svg")
    return f'<svg role="img" aria-label="{escape(label)}"{svg}'
