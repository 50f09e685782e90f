"""Tables and short text documents for Markdown files, the terminal and HTML pages."""

import dataclasses
import html
from collections.abc import Iterable, Sequence

import rich.table
from rich import box
from rich.text import Text

from mixer.console import Console
from mixer.errors import printable
from mixer.formatting import in_markdown


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      header: a name per column; () is allowed only in HTML, and makes the first cell of each row a
        header cell.
      rows: a cell per column; the first column names the row, and the others hold figures.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Table | Sequence[str]  # a table, or the lines of a paragraph


def markdown(table: Table) -> list[str]:
    """Formats a table as lines of Markdown, with the figures aligned to the right."""
    rule = "|---" + "|--:" * (len(table.header) - 1) + "|"
    header, *rows = (
        f"| {' | '.join(map(in_markdown, cells))} |" for cells in (table.header, *table.rows)
    )
    return [header, rule, *rows]


def markdown_document(title: str, blocks: Iterable[Block]) -> str:
    """Formats a Markdown document: a heading, then paragraphs and tables."""
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
    """Prints a table, with borders on a terminal and as Markdown otherwise; folds long cells."""
    rich_table = rich.table.Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for column, name in enumerate(table.header):
        justify = "right" if column else "left"
        rich_table.add_column(Text(printable(name)), justify=justify, overflow="fold")
    for row in table.rows:
        rich_table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(rich_table)


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
    """Formats a table as HTML."""
    lines = []
    if table.header:
        names = "".join(f"<th>{html_text(name)}</th>" for name in table.header)
        lines.append(f"<tr>{names}</tr>")
    kind = "td" if table.header else "th"
    for first, *figures in table.rows:
        cells = "".join(f"<td>{html_text(figure)}</td>" for figure in figures)
        lines.append(f"<tr><{kind}>{html_text(first)}</{kind}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def html_text(value: object) -> str:
    """Formats a value as text and escapes it for HTML, including attributes."""
    return html.escape(printable(str(value)))


def percent(share: float | None) -> str:
    """Formats a share as 64.20%, and None as ""."""
    return "" if share is None else f"{share:.2%}"


def span(ends: Sequence[float]) -> str:
    """Formats an interval of shares as 61.18% to 67.11%."""
    return f"{ends[0]:.2%} to {ends[1]:.2%}"


def short_span(ends: Sequence[float] | None) -> str:
    """Formats an interval of shares in per cent as 61.18-67.11, and None as ""."""
    return "" if ends is None else f"{100 * ends[0]:.2f}-{100 * ends[1]:.2f}"
