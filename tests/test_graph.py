"""Who changes the graph sees it in the diff."""

from tests.graph import ROOT, resolved


def test_the_graph_is_the_one_in_graph_txt() -> None:
    expected = (ROOT / "tests/graph.txt").read_text(encoding="utf-8")
    assert resolved() == expected, "if this change is meant: python -m tests.graph > tests/graph.txt"
