"""Promotion and refusal in a real registry (SQLite); its models are never loaded, that is for stages.examine to do."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.promotion import promotion
from pipelines.promotion.history import promotions
from pipelines.promotion.promotion import Outcome, RegistrySnapshot, settle
from stages.registry import tags, versions
from stages.registry.client import open_client
from stages.registry.examination import Examination
from stages.registry.versions import Version
from stages.runtime.command import StageError

NAME = "bells"
PASSED = {"gate": "passed", "gate.in_force": "none"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], None]) -> Path:
    """A repository of three commits, and a registry of three versions that passed their gate against nothing."""
    root = tmp_path_factory.mktemp("template")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        new_database(root)
        client = open_client()
        experiment = client.create_experiment("synset/finetune")
        for number in (1, 2, 3):
            subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", str(number)], cwd=root, check=True)
            run = client.create_run(experiment)
            model = client.create_logged_model(experiment, "model", source_run_id=run.info.run_id)
            tags = {**PASSED, "git.commit": commit(root)}
            source = f"models:/{model.model_id}"
            version = versions.create_version(NAME, "About bells.", source, run.info.run_id, tags, "Card")
            versions.finish_version(version, f"sha-{number}")
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, in which nothing is in force."""
    shutil.copytree(template, tmp_path / "root")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path / "root")
    yield tmp_path / "root"


def commit(root: Path, name: str = "HEAD") -> str:
    """The commit of a name; empty where there is none."""
    return subprocess.run(
        ["git", "rev-parse", "--verify", "-q", name], cwd=root, capture_output=True, text=True
    ).stdout.strip()


def version(number: int) -> Version:
    """A version as it is now."""
    return next(each for each in versions.list_versions(NAME) if each.number == number)


def aliases() -> dict[str, int]:
    """What each alias points at."""
    return {alias: each.number for each in versions.list_versions(NAME) for alias in each.aliases}


def table() -> list[tuple[int, int | None, str, str]]:
    """The promotions table, newest first, without times."""
    found = promotions(versions.model_description(NAME))
    return [(each.version, each.instead_of, each.by, each.verdict) for each in found]


class Examiner:
    """Stands in for the process; remembers what it was asked, and lets a test act meanwhile."""

    def __init__(self, gate: str = "passed", sound: bool = True, meanwhile: Callable[[], Any] | None = None) -> None:
        self.asked: list[tuple[int, str]] = []
        self.gate, self.sound, self.meanwhile = gate, sound, meanwhile

    def __call__(self, asked: Version, against: str) -> Examination:
        self.asked.append((asked.number, against))
        if self.meanwhile:
            self.meanwhile()
        reasons = () if self.sound else ("model.safetensors is not what was registered",)
        return Examination(self.sound, self.gate, True, reasons)


def tick(root: Path, examine: Examiner | None = None, told: list[Outcome] | None = None) -> Outcome:
    """One run of reconcile."""
    return settle(NAME, examine or Examiner(), ([] if told is None else told).append, root)


def wish(number: int, **tags: str) -> None:
    """What a person does in the UI."""
    versions.set_tags(version(number), tags)
    versions.set_alias(version(number), "champion")


def test_nothing_to_do_is_said(root: Path) -> None:
    assert tick(root).message == "bells: nothing is in force, and no version is `champion`"


def test_the_first_champion_comes_into_force(root: Path) -> None:
    wish(1, approved_by="Ana")
    examine, told = Examiner(), list[Outcome]()
    outcome = tick(root, examine, told)
    assert (outcome.kind, outcome.version) == ("promoted", 1)
    assert told == [outcome]
    assert examine.asked == [(1, "none")]
    assert aliases() == {"champion": 1, "serving": 1}
    assert table() == [(1, None, "Ana", "passed")]
    assert versions.model_description(NAME).startswith("About bells.\n\n## Promotions")
    assert commit(root, "refs/tags/champion") == version(1).commit
    assert version(1).tags["promoted"][:4].isdigit()
    assert tags.PROMOTING not in version(1).tags
    told.clear()
    assert tick(root, examine, told).kind == "unchanged"
    assert (told, len(examine.asked)) == ([], 1)


def test_the_next_champion_takes_its_place_and_an_older_one_can_come_back(root: Path) -> None:
    wish(1, approved_by="Ana")
    tick(root)
    wish(2, approved_by="Grace")
    examine = Examiner()
    assert tick(root, examine).message == "bells: version 2 is in force instead of version 1 (passed)"
    assert aliases() == {"champion": 2, "serving": 2, "previous": 1}

    wish(1)
    examine.gate = "failed"  # a version that scored worse must not keep anybody from going back
    assert tick(root, examine).kind == "promoted"
    assert examine.asked == [(2, "1"), (1, "")]
    assert aliases() == {"champion": 1, "serving": 1, "previous": 2}
    assert commit(root, "refs/tags/champion") == version(1).commit
    wish(2, approved_by="Ada")
    tick(root, examine)
    # Nobody said who rolled back: the tag is still that of the first promotion.
    assert table() == [
        (2, 1, "Ada", "again in force"), (1, 2, "", "rollback"), (2, 1, "Grace", "passed"), (1, None, "Ana", "passed")
    ]  # fmt: skip


def test_a_signature_counts_once_however_often_a_version_comes_back(root: Path) -> None:
    wish(1, approved_by="Ana")
    tick(root)
    for number in (2, 1, 2, 1):
        wish(number)
        tick(root)
    assert [by for _, _, by, _ in table()] == ["", "", "", "", "Ana"]


@pytest.mark.parametrize("gate", ["failed", "inconclusive"])
def test_a_version_whose_gate_was_not_passed_goes_back_at_once(root: Path, gate: str) -> None:
    wish(1)
    tick(root)
    wish(2, gate=gate, **{"gate.in_force": "sha-1"})
    examine, told = Examiner(), list[Outcome]()
    outcome = tick(root, examine, told)
    assert outcome.kind == "refused"
    assert f"its gate says `{gate}`" in outcome.message
    assert "version 1 stays in force, and is `champion` again" in outcome.message
    assert told == [outcome]
    assert examine.asked == []
    assert aliases() == {"champion": 1, "serving": 1}
    assert f"its gate says `{gate}`" in version(2).tags["promotion.refused"]
    assert "promoted" not in version(2).tags
    assert len(table()) == 1
    assert tick(root).kind == "unchanged"  # it is the change of the alias that is judged


def test_a_first_champion_that_is_refused_leaves_nothing_in_force(root: Path) -> None:
    wish(1, gate="failed")
    assert "nothing is in force" in tick(root).message
    assert aliases() == {}


def test_a_reason_given_by_a_person_overrides_the_gate_but_not_the_examination(root: Path) -> None:
    wish(1)
    tick(root)
    wish(2, gate="failed", **{"gate.in_force": "sha-1"})
    tick(root)
    wish(2, override="  ")
    assert tick(root).kind == "refused"
    wish(2, override="the new camera is out | now")
    assert tick(root, Examiner("failed", sound=False)).kind == "refused"
    assert aliases()["champion"] == 1
    wish(2)
    assert tick(root, Examiner("failed")).kind == "promoted"
    assert table()[0] == (2, 1, "", "override: the new camera is out | now")
    assert "promotion.refused" not in version(2).tags


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"unfinished": "retrain"}, "retraining has not finished it"),
        ({"retracted": "d-2026-11-23"}, "the batch d-2026-11-23, which was taken back"),
        ({"model.sha256": ""}, "its registration was interrupted"),
    ],
)
def test_some_versions_are_refused_whatever_anybody_says(root: Path, tags: dict[str, str], reason: str) -> None:
    wish(2, promoted="2026-11-01T00:00:00+00:00", override="please", **tags)
    examine = Examiner()
    assert reason in tick(root, examine).message
    assert reason in version(2).tags["promotion.refused"]
    assert (examine.asked, aliases()) == ([], {})


def test_damaged_weights_are_refused_also_where_they_were_in_force_before(root: Path) -> None:
    wish(1)
    tick(root)
    wish(2)
    tick(root)
    wish(1)
    assert "model.safetensors is not what was registered" in tick(root, Examiner(sound=False)).message
    assert aliases() == {"champion": 2, "serving": 2, "previous": 1}


def test_a_gate_taken_against_another_version_is_taken_again(root: Path) -> None:
    wish(1)
    tick(root)
    wish(2, gate="failed")  # against nothing in force; that says nothing about now
    examine = Examiner("passed")
    assert tick(root, examine).kind == "promoted"
    assert examine.asked == [(2, "1")]
    wish(3)
    assert "its gate says `inconclusive`" in tick(root, Examiner("inconclusive")).message
    assert aliases()["serving"] == 2


def test_an_alias_that_was_taken_off_comes_back(root: Path) -> None:
    wish(1)
    tick(root)
    versions.delete_alias(NAME, "champion")
    told: list[Outcome] = []
    assert tick(root, told=told).kind == "put back"
    assert len(told) == 1
    assert aliases() == {"champion": 1, "serving": 1}


def test_the_version_in_force_deleted_is_an_error_until_another_is_wished_for(root: Path) -> None:
    wish(1)
    tick(root)
    versions.delete_version(version(1))
    assert aliases() == {}
    with pytest.raises(StageError, match="version 1, which was in force, was deleted"):
        tick(root)
    wish(2)
    assert tick(root).kind == "promoted"
    versions.delete_alias(NAME, "serving")
    versions.delete_alias(NAME, "champion")
    assert tick(root).kind == "unchanged"  # somebody wants nothing to be in force, and nothing is lost


def both_by_hand(number: int, **tags: str) -> None:
    """What a person does who takes `serving` for the alias to set."""
    wish(number, **tags)
    versions.set_alias(version(number), "serving")


def test_serving_set_by_hand_is_undone(root: Path) -> None:
    wish(1)
    tick(root)
    versions.set_alias(version(2), "serving")
    told: list[Outcome] = []
    assert tick(root, told=told).kind == "unchanged"
    assert [each.message for each in told] == [
        "bells: `serving` was set on version 2 by hand; version 1 is in force again. Only a promotion sets that alias: "
        "set `champion`"
    ]
    assert aliases() == {"champion": 1, "serving": 1}
    versions.delete_alias(NAME, "champion")
    versions.set_alias(version(2), "serving")
    tick(root)
    assert aliases() == {"champion": 1, "serving": 1}


def test_both_set_by_hand_is_a_wish_like_any_other(root: Path) -> None:
    both_by_hand(1)
    examine = Examiner()
    tick(root, examine)
    assert table() == [(1, None, "", "passed")]
    both_by_hand(2)
    tick(root, examine)
    assert examine.asked == [(1, "none"), (2, "1")]
    assert table()[0] == (2, 1, "", "passed")
    assert aliases() == {"champion": 2, "serving": 2, "previous": 1}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("tags", "sound"),
    [
        ({"unfinished": "retrain"}, True),
        ({"retracted": "d-2026-11-23"}, True),
        ({"gate": "failed", "gate.in_force": "sha-1"}, True),
        ({}, False),
    ],
)
def test_what_may_not_come_into_force_does_not_by_hand_either(
    root: Path, tags: dict[str, str], sound: bool, first: bool
) -> None:
    if not first:
        wish(1)
        tick(root)
    both_by_hand(2, **tags)
    assert tick(root, Examiner("failed", sound)).kind == "refused"
    assert aliases() == ({} if first else {"champion": 1, "serving": 1})
    assert "promoted" not in version(2).tags


def test_an_older_version_set_by_hand_is_examined_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        monkeypatch.setattr(promotion, "_now", lambda day=number: f"2026-11-0{day}T00:00:00+00:00")
        wish(number)
        tick(root)
    both_by_hand(1)
    assert tick(root, Examiner(sound=False)).kind == "refused"
    assert aliases() == {"champion": 2, "serving": 2, "previous": 1}


def test_by_hand_after_the_version_in_force_was_deleted_it_is_the_previous_one_that_counts(root: Path) -> None:
    for number in (1, 2):
        wish(number)
        tick(root)
    versions.delete_version(version(2))
    both_by_hand(3)
    examine = Examiner("failed")
    assert tick(root, examine).kind == "refused"
    assert examine.asked == [(3, "1")]
    assert aliases() == {"champion": 1, "serving": 1, "previous": 1}
    assert tick(root).kind == "unchanged"


def test_of_a_description_that_takes_no_line_the_tag_says_what_was_promoted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "describe_model", lambda *_: None)
    wish(1)
    tick(root)
    assert (tick(root).kind, table()) == ("unchanged", [])


def test_a_wish_that_changes_during_the_examination_is_what_counts(root: Path) -> None:
    wish(1)
    tick(root)
    wish(2)
    examine = Examiner()
    examine.meanwhile = lambda: wish(3) if examine.asked == [(2, "1")] else None
    assert tick(root, examine).version == 3
    assert examine.asked == [(2, "1"), (3, "1")]
    assert aliases() == {"champion": 3, "serving": 3, "previous": 1}
    assert not {"promoted", "promotion.refused"} & set(version(2).tags)


def test_a_wish_withdrawn_or_retracted_during_the_examination_is_none(root: Path) -> None:
    wish(1)
    tick(root)
    wish(2)
    assert tick(root, Examiner(meanwhile=lambda: wish(1))).kind == "unchanged"
    wish(2)
    batch = {"retracted": "d-1"}
    assert tick(root, Examiner(meanwhile=lambda: versions.set_tags(version(2), batch))).kind == "refused"
    assert aliases() == {"champion": 1, "serving": 1}


def test_somebody_who_signs_during_the_examination_is_named(root: Path) -> None:
    wish(1)
    tick(root, Examiner(meanwhile=lambda: versions.set_tags(version(1), {"approved_by": "Ana"})))
    assert table() == [(1, None, "Ana", "passed")]


def test_aliases_that_never_rest_end_with_a_message(root: Path) -> None:
    wish(1)
    others = iter([2, 3] * 10)
    with pytest.raises(StageError, match="its aliases change all the time"):
        tick(root, Examiner(meanwhile=lambda: wish(next(others))))


def test_a_version_without_a_known_commit_has_no_git_tag(root: Path) -> None:
    wish(1)
    tick(root)
    versions.set_tags(version(2), {"git.commit": "0" * 40})
    wish(2)
    assert "this clone lacks its commit 000" in tick(root).message
    assert commit(root, "refs/tags/champion") == ""
    versions.delete_tag(version(3), "git.commit")
    wish(3)
    assert "it names no commit" in tick(root).message


def test_a_git_tag_that_was_moved_is_set_again(root: Path) -> None:
    wish(1)
    tick(root)
    subprocess.run(["git", "tag", "-f", "champion", version(3).commit], cwd=root, check=True, capture_output=True)
    assert tick(root).kind == "unchanged"
    assert commit(root, "refs/tags/champion") == version(1).commit


def test_nothing_in_force_any_more_has_no_git_tag(root: Path) -> None:
    wish(1)
    tick(root)
    for alias in ("serving", "champion"):
        versions.delete_alias(NAME, alias)
    assert tick(root).kind == "unchanged"
    assert commit(root, "refs/tags/champion") == ""


@pytest.mark.parametrize("journal", ["yes", "5", '{"when": "now"}'])
@pytest.mark.parametrize("number", [1, 2])
def test_a_journal_that_is_none_of_ours_is_removed(root: Path, journal: str, number: int) -> None:
    wish(1)
    tick(root)
    versions.set_tags(version(number), {tags.PROMOTING: journal})
    assert tick(root).kind == "unchanged"
    assert tags.PROMOTING not in version(number).tags
    assert aliases() == {"champion": 1, "serving": 1}


def test_a_signature_that_the_table_holds_in_other_words_is_still_an_earlier_one(root: Path) -> None:
    wish(1, approved_by="Ana  Banana\n| of <QA> " + "x" * 300)
    tick(root)
    for number in (2, 1):
        wish(number)
        tick(root)
    assert [by[:18] for _, _, by, _ in table()] == ["", "", "Ana Banana | of <Q"]


# ------------------------------------------------------------------------------------------------------ death anywhere


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the code catches it."""


WRITES = ["set_tags", "delete_tag", "set_alias", "delete_alias", "describe_model"]


def run_until_killed(root: Path, after: int, examine: Examiner) -> bool:
    """A run that dies right after that many writes to registry and repository; False if it ended before."""
    done = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal done
            result = real(*arguments)
            done += real is not promotion.git or arguments[1] == "update-ref"
            if done == after:
                raise KilledError
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(versions, name, dying(getattr(versions, name)))
        patch.setattr(promotion, "git", dying(promotion.git))
        try:
            tick(root, examine)
        except KilledError:
            return True
    return False


def state(root: Path) -> tuple[Any, ...]:
    """Everything that reconcile writes, without times."""
    tags = {each.number: sorted(each.tags) for each in versions.list_versions(NAME)}
    return aliases(), tags, table(), commit(root, "refs/tags/champion")


def begin(case: str) -> Examiner:
    """Version 1 is in force after 3, and somebody wishes for something else."""
    if case == "refusal":
        wish(2)
        return Examiner("failed")
    if case == "rollback":
        wish(3)
        return Examiner("failed")
    if case == "by hand":
        both_by_hand(2)
        return Examiner()
    if case == "removed":
        versions.delete_alias(NAME, "champion")
        return Examiner()
    wish(2, approved_by="Grace", **{"promotion.refused": "an earlier try"})
    return Examiner()


@pytest.mark.parametrize(
    ("case", "withdrawn"),
    [
        ("promotion", False),
        ("refusal", False),
        ("removed", False),
        pytest.param("promotion", True, marks=pytest.mark.slow),
        pytest.param("by hand", False, marks=pytest.mark.slow),
        pytest.param("rollback", False, marks=pytest.mark.slow),
    ],
)
def test_death_after_any_write_ends_in_the_state_before_or_the_state_after(
    root: Path, tmp_path: Path, case: str, withdrawn: bool
) -> None:
    for number in (3, 1):
        wish(number)
        tick(root)
    before = state(root)
    calm = tmp_path / "calm.db"
    shutil.copyfile("mlflow.db", calm)

    def start_over() -> Examiner:
        shutil.copyfile(calm, "mlflow.db")
        subprocess.run(["git", "tag", "-f", "champion", version(1).commit], cwd=root, check=True, capture_output=True)
        return begin(case)

    tick(root, start_over())
    expected = state(root)
    deaths = 0
    examine = start_over()
    while run_until_killed(root, deaths + 1, examine):
        deaths += 1
        in_force_now = aliases()["serving"]
        assert in_force_now in (before[0]["serving"], expected[0]["serving"])
        if withdrawn and in_force_now == 1:  # the person has second thoughts before the next run
            wish(1)
            tick(root)
            assert (aliases(), table(), commit(root, "refs/tags/champion")) == (before[0], before[2], before[3])
            assert tags.PROMOTING not in {tag for each in versions.list_versions(NAME) for tag in each.tags}
        else:
            tick(root, examine)
            assert state(root) == expected, f"killed after write {deaths}"
        assert tick(root).kind == "unchanged"
        examine = start_over()
    assert deaths == {"promotion": 8, "by hand": 8, "rollback": 7, "refusal": 2, "removed": 1}[case]


def test_a_kill_during_the_notification_repeats_it_and_nothing_else(root: Path) -> None:
    wish(1)

    def dies(outcome: Outcome) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        settle(NAME, Examiner(), dies, root)
    told: list[Outcome] = []
    tick(root, told=told)
    assert [each.kind for each in told] == ["promoted"]
    assert len(table()) == 1


def test_one_look_holds_all(root: Path) -> None:
    registry = promotion.read_registry(NAME)
    assert isinstance(registry, RegistrySnapshot)
    assert [each.number for each in registry.versions] == [3, 2, 1]
    assert registry.at("champion") is None
