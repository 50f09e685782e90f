"""The HTML page of `mixer.tools.inspect`, without scripts and external resources."""

import base64
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from mixer import files
from mixer.evaluation.tables import html_text

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --quiet: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto;
  padding: 0 1rem 3rem; }
h1, h2, td, th, p, pre, figcaption { overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; }
.wide { overflow-x: auto; }
.wide img { min-width: 36rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .missing { color: var(--quiet); font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { text-align: left; vertical-align: top; min-width: 3.6rem; padding: 0.2rem 0.8rem 0.2rem 0;
  border-bottom: 1px solid var(--line); }
pre { white-space: pre-wrap; font-size: 0.8rem; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Page:
    """The directory of the page and its pictures; reports pictures that cannot be drawn.

    Attributes:
      directory: the directory.
      log: prints a line about the progress or about a missing picture.
    """

    directory: epath.Path
    log: Callable[[str], None]

    def missing(self, content: str, reason: Any) -> str:
        """Logs that some content is not drawn; returns a paragraph that says so on the page."""
        self.log(f"not drawn: {content}: {reason}")
        return f'<p class="missing">Not drawn: {html_text(content)}: {html_text(reason)}</p>'

    def write(self, title: str, sections: Iterable[str]) -> epath.Path:
        """Writes index.html and returns its path."""
        path = self.directory / "index.html"
        with files.atomic_write(path) as new_file:
            new_file.write_text(_document(title, sections))
        return path


def _document(title: str, sections: Iterable[str]) -> str:
    """Returns a self-contained HTML document, without scripts and external resources."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html_text(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def make_section(title: str, *parts: str) -> str:
    """Returns the HTML of a section with a heading."""
    return f"<section>\n<h2>{html_text(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def embed_picture(path: epath.Path, alt: str, caption: str = "") -> str:
    """Returns the HTML of an embedded picture that scrolls on narrow screens."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{html_text(alt)}" src="data:image/png;base64,{data}">'
    box = f'<div class="wide" tabindex="0">{image}</div>'
    return f"<figure>{box}<figcaption>{html_text(caption)}</figcaption></figure>"
