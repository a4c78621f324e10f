"""The harness of bench/: rounds in turn, medians, ratios, the last line, what --check does, peers that cannot run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import environment, rounds
from bench.rounds import (
    Bound,
    Candidate,
    Goal,
    Peer,
    PeerError,
    Table,
    arguments,
    lines,
    measure,
    measured,
    misses,
    report,
)

MACHINE = {"cpu": "Abacus 2000", "cores": 2, "load": 0.1}


def giving(name: str, role: rounds.Role, *figures: float, calls: list[str] | None = None) -> Candidate:
    """A candidate that gives these figures, one a round, the first in the round that does not count."""
    left = list(figures)

    def run() -> float:
        if calls is not None:
            calls.append(name)
        return left.pop(0)

    return Candidate(name, role, run)


def failing(name: str, words: str) -> Candidate:
    """A peer that is not there."""

    def run() -> float:
        raise PeerError(words)

    return Candidate(name, "peer", run)


def table(*goals: Goal | Bound, missing: str | None = None) -> Table:
    """Three candidates, three rounds: medians 150, 60 and 500."""
    candidates = [
        giving("ours", "ours", 1, 140, 170, 150),
        giving("torchvision", "peer", 999, 60, 50, 90),
        giving("libjpeg-turbo", "limit", 1, 500, 500, 500),
        *([failing("FFCV", missing)] if missing else []),
    ]
    return measured("256 px", "images/s", candidates, goals, rounds=3)


def run_report(tables: list[Table], folder: Path, *extra: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the JSON."""
    options = arguments("a bench").parse_args(["--images", str(folder), "--json", str(folder / "bench.json"), *extra])
    code = report(tables, options, MACHINE, {"torch": "2.15.0"})
    return code, json.loads((folder / "bench.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ measuring


def test_every_candidate_has_its_turn_in_every_round_and_another_one_begins_each_time() -> None:
    calls: list[str] = []
    candidates = [giving(name, "ours", *range(5), calls=calls) for name in "abc"]
    figures = measure(candidates, rounds=4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert figures == {name: [1, 2, 3, 4] for name in "abc"}, "the first round does not count"


def test_a_table_runs_what_it_measures_once_before_it_counts() -> None:
    calls: list[str] = []
    found = measured("t", "s", [giving("a", "ours", 9, 1, 2, calls=calls), failing("b", "no compiler")], rounds=2)
    assert found.figures == {"a": [1, 2]}
    assert calls == ["a"] * 3


def test_names_must_differ_and_there_must_be_a_round() -> None:
    with pytest.raises(ValueError, match="names must differ"):
        measure([giving("a", "ours"), giving("a", "peer")])
    with pytest.raises(ValueError, match="must be a round"):
        measured("t", "s", [giving("a", "ours")], rounds=0)


def test_ratios_are_of_medians_and_above_one_where_ours_is_better() -> None:
    assert table().median("ours") == 150
    assert table().ratio("ours", "torchvision") == 2.5
    assert table().ratio("ours", "libjpeg-turbo") == 0.3
    seconds = measured("first batch", "s", [giving("ours", "ours", 0, 0.5), giving("tv", "peer", 0, 2)], rounds=1,
                       lower_is_better=True)  # fmt: skip
    assert seconds.ratio("ours", "tv") == 4


# --------------------------------------------------------------------------------------------------------------- saying


def test_the_table_shows_median_range_and_ratio() -> None:
    head, *rows = lines(table(missing="first\nno compiler"))
    assert head.split() == ["256", "px", "images/s", "min", "–", "max", "×", "by", "ours"]
    assert [row.split() for row in rows] == [
        ["ours", "150", "140", "–", "170"],
        ["torchvision", "60", "50", "–", "90", "2.50"],
        ["libjpeg-turbo", "500", "500", "–", "500", "0.30"],
        ["FFCV", "not", "measured:", "no", "compiler"],
    ]


def test_the_last_line_names_the_ratio_to_each_peer_and_to_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = measured("full size", "images/s", [giving("ours", "ours", 0, 8), giving("FFCV", "peer", 0, 4)], rounds=1)
    run_report([table(missing="no compiler"), other], tmp_path)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == (
        "256 px: ours is 2.50 × torchvision, 0.30 × libjpeg-turbo (the limit), no figure of FFCV; "
        "full size: ours is 2.00 × FFCV"
    )
    assert "Abacus 2000, 2 cores, load 0.1 at the start" in printed
    assert "torch 2.15.0" in printed


def test_the_json_holds_every_round_the_ratios_and_what_it_was_measured_on(tmp_path: Path) -> None:
    _, found = run_report([table(Goal("ours", "torchvision", 2), missing="no compiler")], tmp_path)
    (first,) = found["tables"]
    rows = {row["name"]: row for row in first["rows"]}
    assert rows["ours"]["figures"] == [140, 170, 150]
    assert rows["torchvision"] == {
        "name": "torchvision", "role": "peer", "median": 60, "min": 50, "max": 90, "figures": [60, 50, 90],
        "ratios": {"ours": 2.5},
    }  # fmt: skip
    assert first["missing"] == {"FFCV": "no compiler"}
    assert first["goals"] == [{"ours": "ours", "over": "torchvision", "at_least": 2, "met": True}]
    assert (found["machine"], found["versions"]) == (MACHINE, {"torch": "2.15.0"})


# ---------------------------------------------------------------------------------------------------------------- goals


@pytest.mark.parametrize(
    ("goal", "missed"),
    [
        (Goal("ours", "torchvision", 2.5), None),
        (Goal("ours", "torchvision", 2.51), "256 px: ours is 2.50 × torchvision, not 2.51 ×"),
        (Goal("ours", "FFCV", 0.1), "256 px: FFCV was not measured (no compiler)"),
        (Goal("ours", "nothing", 0.1), "256 px: nothing was not measured (no such candidate)"),
        (Bound("ours", "at least", 150), None),
        (Bound("ours", "at least", 151), "256 px: ours is 150 images/s, not at least 151"),
        (Bound("torchvision", "at most", 60), None),
        (Bound("torchvision", "at most", 59), "256 px: torchvision is 60 images/s, not at most 59"),
    ],
)
def test_check_fails_where_a_goal_is_missed_or_could_not_be_measured_and_says_which(
    goal: Goal | Bound, missed: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_once = table(goal, missing="no compiler")
    assert misses(measured_once) == ([missed] if missed else [])
    assert run_report([measured_once], tmp_path)[0] == 0, "it only fails where it is asked to"
    code, found = run_report([measured_once], tmp_path, "--check")
    assert code == (1 if missed else 0)
    assert found["missed"] == ([missed] if missed else [])
    assert (f"goal missed: {missed}" in capsys.readouterr().out) == bool(missed)


def test_the_images_must_be_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("a bench").parse_args(["--images", "nowhere"])
    assert "nowhere is no folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- peers


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Peer]:
    """A peer with a script of its own, in this environment."""

    def make(script: str) -> Peer:
        (tmp_path / "bench/peers").mkdir(parents=True)
        (tmp_path / "bench/peers/made_up.py").write_text(script, encoding="utf-8")
        monkeypatch.setattr(rounds, "ROOT", tmp_path)
        monkeypatch.setattr(environment, "python", lambda name: Path(sys.executable))
        return Peer("made_up", "--epoch", "7")

    return make


def test_a_peer_prepares_once_and_answers_every_round(peer: Callable[[str], Peer]) -> None:
    script = """
import json, sys
print("words of a library", file=sys.stderr)
print(json.dumps({"versions": {"made-up": "1"}}), flush=True)
for number, line in enumerate(sys.stdin):
    print(json.dumps({"images_per_second": number, "epoch": int(sys.argv[2])}), flush=True)
"""
    with peer(script) as made_up:
        assert made_up.versions == {}
        assert [made_up.go() for _ in range(3)] == [{"images_per_second": number, "epoch": 7} for number in range(3)]
        assert made_up.versions == {"made-up": "1"}
        process = made_up._process
    assert process and process.poll() is not None, "it ends with the bench"


@pytest.mark.parametrize(
    "before", ["", "print('{\"versions\": {}}', flush=True); input()"], ids=["as it prepares", "in a round"]
)
def test_a_peer_that_fails_says_with_which_words(peer: Callable[[str], Peer], before: str) -> None:
    with peer(f"{before}\nraise SystemExit('no libturbojpeg here')") as made_up:
        with pytest.raises(PeerError, match=r"made_up.py ended with 1:\nno libturbojpeg here"):
            made_up.go()
        found = measured("t", "images/s", [Candidate("it", "peer", lambda: made_up.go()["images_per_second"])])
        assert "no libturbojpeg here" in found.missing["it"]


def test_an_environment_that_cannot_be_made_is_a_peer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/requirements.txt").write_text("this is no requirement ==\n", encoding="utf-8")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    with Peer("torchvision_folder") as torchvision, pytest.raises(PeerError, match=r"pip install|no uv here"):
        torchvision.go()
    monkeypatch.setattr(environment, "_uv", lambda: (_ for _ in ()).throw(PeerError("no uv here")))
    with pytest.raises(PeerError, match="no uv here"):
        environment.python("bench")


def test_peers_are_pinned_and_never_of_the_projects_own_environment() -> None:
    for name in environment.REQUIREMENTS.values():
        lines_ = (rounds.ROOT / "bench" / name).read_text(encoding="utf-8").splitlines()
        packages = [line for line in lines_ if line and not line.startswith("#")]
        assert packages
        assert all("==" in line for line in packages)
