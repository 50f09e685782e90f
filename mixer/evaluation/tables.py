"""Tables and short documents of text: for Markdown files, for the terminal and for HTML pages."""

import dataclasses
import html
from collections.abc import Iterable, Sequence

import rich.table
from rich import box
from rich.text import Text

from mixer.console import Console
from mixer.data.sources import folder
from mixer.errors import printable
from mixer.formatting import in_markdown


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      header: a name per column; () only in HTML, where each row then begins with its own name.
      rows: a cell per column; the first column names the row, the others hold figures.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Table | Sequence[str]  # a table, or the lines of a paragraph


def markdown(table: Table) -> list[str]:
    """The lines of a table in Markdown, the figures aligned to the right."""
    rule = "|---" + "|--:" * (len(table.header) - 1) + "|"
    header, *rows = (
        f"| {' | '.join(map(in_markdown, cells))} |" for cells in (table.header, *table.rows)
    )
    return [header, rule, *rows]


def markdown_document(title: str, blocks: Iterable[Block]) -> str:
    """A document in Markdown: a heading, then paragraphs and tables."""
    lines = [f"# {in_markdown(title)}"]
    for block in blocks:
        lines.append("")
        if isinstance(block, Table):
            lines += markdown(block)
        else:
            line_break = "  " if len(block) > 1 else ""
            lines += [in_markdown(line) + line_break for line in block]
    return "\n".join(lines) + "\n"


def print_table(console: Console, table: Table) -> None:
    """Prints a table: drawn at a terminal, where long cells are folded; elsewhere as Markdown."""
    drawn = rich.table.Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for place, name in enumerate(table.header):
        justify = "right" if place else "left"
        drawn.add_column(Text(printable(name)), justify=justify, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console.print(drawn)


def print_document(console: Console, title: str, blocks: Iterable[Block]) -> None:
    """Prints the content of `markdown_document`."""
    console.say(printable(title))
    for block in blocks:
        console.say("")
        if isinstance(block, Table):
            print_table(console, block)
        else:
            for line in block:
                console.say(printable(line))


def html_table(table: Table) -> str:
    """A table in HTML."""
    lines = []
    if table.header:
        names = "".join(f"<th>{html_text(name)}</th>" for name in table.header)
        lines.append(f"<tr>{names}</tr>")
    kind = "td" if table.header else "th"
    for first, *others in table.rows:
        cells = "".join(f"<td>{html_text(cell)}</td>" for cell in others)
        lines.append(f"<tr><{kind}>{html_text(first)}</{kind}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def html_text(value: object) -> str:
    """The value as text that is escaped for HTML, also inside an attribute."""
    return html.escape(folder.displayed(str(value)))


def percent(share: float | None) -> str:
    """A share as 64.20%; "" for None."""
    return "" if share is None else f"{share:.2%}"


def span(ends: Sequence[float]) -> str:
    """An interval of shares as 61.18% to 67.11%."""
    return f"{ends[0]:.2%} to {ends[1]:.2%}"


def short_span(ends: Sequence[float] | None) -> str:
    """An interval of shares as 61.18-67.11, in per cent; "" for None."""
    return "" if ends is None else f"{100 * ends[0]:.2f}-{100 * ends[1]:.2f}"
