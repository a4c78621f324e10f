"""One strict environment."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from stages.pages.templates import breakable, data_uri, render


def test_names_are_escaped() -> None:
    assert breakable("<b>_x") == "&lt;b&gt;_<wbr>x"


def test_a_misspelt_name_raises(tmp_path: Path) -> None:
    template = tmp_path / "page.html.j2"
    template.write_text("{{ report.acepted }}")
    with pytest.raises(UndefinedError, match="acepted"):
        render(template, report={"accepted": 1})


def test_html_is_escaped_and_markdown_is_not(tmp_path: Path) -> None:
    for name, shown in (("page.html.j2", "&lt;b&gt;"), ("card.md.j2", "<b>")):
        (tmp_path / name).write_text("{{ name }} {{ share | percent }}")
        assert render(tmp_path / name, name="<b>", share=0.01) == f"{shown} 1.0\N{NO-BREAK SPACE}%"


def test_a_page_is_one_file(tmp_path: Path) -> None:
    template = tmp_path / "page.html.j2"
    template.write_text(
        """{% extends "layout.html.j2" %}{% block title %}T{% endblock %}{% block body %}{{ uri }}{% endblock %}"""
    )
    page = render(template, uri=data_uri(b"x", "png"))
    assert "--paper" in page and "data:image/png;base64,eA==" in page
    assert "http" not in page and "url(" not in page and "@import" not in page
