"""No name can break out of the page."""

import json
import re
from pathlib import Path

import pytest

from bench import report as made_up


def test_no_name_breaks_out_of_the_page_of_many_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"</script><script>alert({i})</script>&\"'" for i in range(30)]
    test, facts = made_up.predictions(900, 30)
    made_up.write_inputs(facts)
    made_up.built(test, names)
    page = Path("reports/report.html").read_text()
    assert page.count("<script") == 2 and "alert(1)" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
    found = re.search(r'<script type="application/json" id="confusion">(.*?)</script>', page, re.DOTALL)
    assert found
    shown = json.loads(found[1])
    assert sorted(shown["names"]) == sorted(names)
    assert sum(count for _, _, count in shown["cells"]) == 900
