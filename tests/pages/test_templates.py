"""One strict environment."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from stages.pages.templates import breakable, data_uri, render, render_markdown


def test_names_are_escaped() -> None:
    assert breakable("<b>_x") == "&lt;b&gt;_<wbr>x"


def test_a_misspelt_name_raises(tmp_path: Path) -> None:
    template = tmp_path / "page.html.j2"
    template.write_text("{{ report.acepted }}")
    with pytest.raises(UndefinedError, match="acepted"):
        render(template, report={"accepted": 1})


def test_a_value_cannot_end_its_place(tmp_path: Path) -> None:
    (tmp_path / "page.html.j2").write_text("<b>{{ name }}</b> {{ share | percent }}")
    assert render(tmp_path / "page.html.j2", name="<i>|", share=0.01) == "<b>&lt;i&gt;|</b> 1.0\N{NO-BREAK SPACE}%"
    (tmp_path / "card.md.j2").write_text("| {{ name }} | {{ share | percent }} |")
    assert render_markdown(tmp_path / "card.md.j2", name="<i>|", share=0.01) == "| &lt;i>\\| | 1.0 % |"


def test_a_page_is_one_file(tmp_path: Path) -> None:
    template = tmp_path / "page.html.j2"
    template.write_text(
        """{% extends "layout.html.j2" %}{% block title %}T{% endblock %}{% block body %}{{ uri }}{% endblock %}"""
    )
    page = render(template, uri=data_uri(b"x", "png"))
    assert "--paper" in page and "data:image/png;base64,eA==" in page
    assert "http" not in page and "url(" not in page and "@import" not in page
