"""One strict Jinja environment for every page and card: a name that a template misspells raises.

A page is one self-contained file: base.css is included, pictures are data URIs, nothing is loaded.
"""

import base64
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from stages.pages import text


def render(template: Path, finalize: Callable[[object], object] | None = None, **values: Any) -> str:
    """The template with these values. The same values give the same bytes.

    Args:
        template: `*.html.j2` is escaped, others are not. It may use templates beside it and in this folder.
        finalize: applied to every value that is written.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not among `values`.
    """
    return _environment(template.parent, finalize).get_template(template.name).render(values)


@cache
def _environment(folder: Path, finalize: Callable[[object], object] | None) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": _unbreakable(text.percent), "percent_range": _unbreakable(text.percent_range),
        "points": text.points, "signed": text.signed, "decimal": text.decimal, "count": text.count,
        "thousands": text.thousands, "words": text.words, "shortened": text.shortened,
        "breakable": breakable, "data_uri": data_uri,
    }  # fmt: skip
    return environment


def data_uri(encoded: bytes, kind: str = "jpeg") -> str:
    """An encoded image as the source of an `<img>`."""
    return f"data:image/{kind};base64," + base64.b64encode(encoded).decode("ascii")


def breakable(name: str) -> Markup:
    """A name, escaped, that may be broken after its underscores and slashes."""
    return Markup(escape(name).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>")))


def _unbreakable(write: Callable[..., str]) -> Callable[..., str]:
    return lambda *values: write(*values).replace(" ", "\N{NO-BREAK SPACE}")
