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


def render(template: Path, **values: Any) -> str:
    """A page of HTML; values are escaped. The same values give the same bytes.

    Args:
        template: may extend, import and include what lies beside it or in this folder.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not among `values`.
    """
    return _environment(template.parent, html=True).get_template(template.name).render(values)


def render_markdown(template: Path, **values: Any) -> str:
    """The same for Markdown: no value can end its table cell nor begin HTML."""
    return _environment(template.parent, html=False).get_template(template.name).render(values)


@cache
def _environment(folder: Path, html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=html,
        undefined=StrictUndefined,
        finalize=None if html else _markdown_cell,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    plain = (text.points, text.signed, text.decimal, text.count, text.thousands, text.words, text.shortened)
    shares = (text.percent, text.percent_range)
    environment.filters |= {each.__name__: each for each in (*plain, *shares, breakable, data_uri)}
    if html:
        environment.filters |= {each.__name__: _unbreakable(each) for each in shares}
    return environment


def _markdown_cell(value: object) -> object:
    return value.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") if isinstance(value, str) else value


def data_uri(encoded: bytes, kind: str = "jpeg") -> str:
    """An encoded image as the source of an `<img>`."""
    return f"data:image/{kind};base64," + base64.b64encode(encoded).decode("ascii")


def breakable(name: str) -> Markup:
    """A name, escaped, that may be broken after its underscores and slashes."""
    return Markup(escape(name).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>")))


def _unbreakable(write: Callable[..., str]) -> Callable[..., str]:
    return lambda *values: write(*values).replace(" ", "\N{NO-BREAK SPACE}")
