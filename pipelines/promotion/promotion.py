"""Promotion: the alias `serving` (in force) follows `champion` (a person's wish), or `champion` is set back to it.

`settle` may be killed anywhere. Its one decisive write is the alias `serving`. Before it, the version gets the tag
`promoting`, a journal of what is about to happen; everything after it is derived from the journal, which is removed
last. So the next run finds one of three states: no journal: it judges; a journal on a version that is not in force: it
takes back what was begun; a journal on the version in force: it completes the rest. Each step may be repeated.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.promotion.history import Promotion, one_line, promotions, with_promotion
from pipelines.retrain.worktree import commit_of
from stages.registry import tags, versions
from stages.registry.examination import Examination
from stages.registry.tags import CHAMPION, PREVIOUS, SERVING
from stages.registry.versions import Version
from stages.runtime.command import StageError
from stages.runtime.git import GitError, git

GIT_TAG = "champion"
_DECISIVE = (tags.OVERRIDE, tags.RETRACTED, tags.UNFINISHED)
"""Tags that others may set while a version is examined, and that change the verdict."""
_ATTEMPTS = 10


@dataclass(frozen=True)
class RegistrySnapshot:
    """The versions of a model at one moment."""

    name: str
    versions: tuple[Version, ...]

    def at(self, alias: str) -> Version | None:
        """The version that an alias points at."""
        return next((version for version in self.versions if alias in version.aliases), None)

    def decisive(self) -> tuple[Any, ...]:
        """What a judgement rests on: if it changes, the judgement is void."""
        champion, serving = self.at(CHAMPION), self.at(SERVING)
        return (
            champion and (champion.number, [champion.tags.get(tag) for tag in _DECISIVE]),
            serving and serving.number,
        )


@dataclass(frozen=True)
class Outcome:
    """The result of `settle`."""

    kind: str
    """`unchanged`, `promoted`, `refused` or `put back`."""
    message: str
    version: int | None = None


@dataclass(frozen=True)
class _Journal:
    """What a promotion is about to do, with versions by number."""

    when: str
    instead_of: int | None
    previous: int | None
    by: str
    verdict: str


Examine = Callable[[Version, str], Examination]
"""Examines a version; its gate must be taken against a version's number, `none`, or, if empty, not at all."""
Tell = Callable[[Outcome], None]


def read_registry(name: str) -> RegistrySnapshot:
    """The registry as it is now."""
    return RegistrySnapshot(name, tuple(versions.list_versions(name)))


def settle(name: str, examine: Examine, tell: Tell, root: Path) -> Outcome:
    """Puts `champion` in force, or sets that alias back; or completes what a killed run had begun.

    Args:
        tell: is called with every outcome except `unchanged`; twice if a run is killed right after it.
        root: the repository in which the git tag `champion` is set.

    Raises:
        StageError: the examination could not be done, somebody keeps moving the aliases, or the version in force was
            deleted and no other one is `champion`.
    """
    for _ in range(_ATTEMPTS):
        registry = read_registry(name)
        if (begun := _journalled(registry)) is not None:
            if (journal := _journal(begun)) is None:
                versions.delete_tag(begun, tags.PROMOTING)  # not ours: nothing was begun
            elif begun == registry.at(SERVING):
                return _complete(begun, journal, tell, root)
            else:
                _take_back(registry, begun, journal)
        elif _set_by_hand(registry):
            _undo(registry, tell)
        elif outcome := _judge(registry, examine, tell, root):
            return outcome
        # Otherwise the registry has changed since it was read.
    raise StageError(f"{name}: its aliases change all the time; the next run looks again")


def _judge(registry: RegistrySnapshot, examine: Examine, tell: Tell, root: Path) -> Outcome | None:
    """None where something changed meanwhile: it must be judged again."""
    champion, serving = registry.at(CHAMPION), registry.at(SERVING)
    if champion == serving:
        return _keep(registry, tell, root)
    if champion is None:
        return _put_back(registry, tell)
    verdict, reason = "", _refusal(champion, serving)
    if reason is None:
        verdict, reason = _verdict(champion, serving, examine)
        # Meanwhile somebody may have set an alias or a tag, which is part of the promotion.
        before, registry = registry, read_registry(registry.name)
        if registry.decisive() != before.decisive():
            return None
    champion = registry.at(CHAMPION)
    assert champion is not None
    if reason is not None:
        return _refuse(registry, champion, reason, tell)
    return _promote(registry, champion, verdict, tell, root)


def _keep(registry: RegistrySnapshot, tell: Tell, root: Path) -> Outcome:
    name, serving = registry.name, registry.at(SERVING)
    if serving is None:
        _refuse_if_deleted(registry)
        if registry.versions:  # none at all: another registry, perhaps
            _tag_commit(None, root)
        return Outcome("unchanged", f"{name}: nothing is in force, and no version is `champion`")
    _tag_commit(serving, root)
    return Outcome("unchanged", f"{name}: version {serving.number} is in force, as it should be", serving.number)


def _refuse_if_deleted(registry: RegistrySnapshot) -> None:
    """Raises StageError where the version in force was deleted: its aliases are gone too, only the table knows it."""
    last = _last_promotion(registry)
    if last and last.version not in {version.number for version in registry.versions}:
        raise StageError(
            f"{registry.name}: version {last.version}, which was in force, was deleted. What serves it goes on until "
            f"it is restarted; set `champion` on another version"
        )


def _set_by_hand(registry: RegistrySnapshot) -> bool:
    """Whether `serving` was set by anybody else than `_promote`: then that version was never judged."""
    serving, last = registry.at(SERVING), _last_promotion(registry)
    if serving is None or serving == _promoted_last(registry):
        return False
    # Its own tag counts too: a description that is too long takes no more lines.
    return serving.tags.get(tags.PROMOTED, "") < last.when if last else tags.PROMOTED not in serving.tags


def _undo(registry: RegistrySnapshot, tell: Tell) -> None:
    """Puts the version that was in force before in force again. A champion is judged after that, like any other."""
    serving, before = registry.at(SERVING), _promoted_last(registry)
    assert serving is not None
    if not _is_unchanged(registry):
        return
    if before:
        versions.set_alias(before, SERVING)
        now = f"version {before.number} is in force again"
    else:
        versions.delete_alias(registry.name, SERVING)
        now = "nothing is in force"
    what = f"`serving` was set on version {serving.number} by hand; {now}"
    message = f"{registry.name}: {what}. Only a promotion sets that alias: set `champion`"
    tell(Outcome("put back", message, serving.number))


def _promoted_last(registry: RegistrySnapshot) -> Version | None:
    """The version promoted last, by the table; if it was deleted, the one before it."""
    last, previous = _last_promotion(registry), registry.at(PREVIOUS)
    found = next((each for each in registry.versions if last and each.number == last.version), None)
    return found or (previous if previous and tags.PROMOTED in previous.tags else None)


def _last_promotion(registry: RegistrySnapshot) -> Promotion | None:
    return next(iter(promotions(versions.model_description(registry.name))), None)


def _put_back(registry: RegistrySnapshot, tell: Tell) -> Outcome | None:
    serving = registry.at(SERVING)
    assert serving is not None  # no champion, and that differs from what is in force
    if not _is_unchanged(registry):
        return None
    versions.set_alias(serving, CHAMPION)
    what = f"`champion` was taken off; it is on version {serving.number} again, which is in force"
    outcome = Outcome("put back", f"{registry.name}: {what}. To change that, set it on another version", serving.number)
    tell(outcome)
    return outcome


# ------------------------------------------------------------------------------------------------------- judgement


def _refusal(champion: Version, serving: Version | None) -> str | None:
    """Why a version cannot come into force, as far as is known without an examination."""
    if champion.unfinished:
        return "retraining has not finished it yet; it becomes `challenger` when it has"
    if not champion.sha256:
        return "its registration was interrupted; `dvc repro -f -s register` registers it anew"
    if batch := champion.tags.get(tags.RETRACTED):
        return f"it was trained on the batch {batch}, which was taken back"
    gate, in_force = champion.tags.get(tags.GATE, ""), serving.sha256 if serving else tags.NO_VERSION
    still_holds = champion.tags.get(tags.GATE_AGAINST) == in_force
    if gate not in ("", "passed") and still_holds and not _stands_in_for_gate(champion):
        return _gate_says(gate)
    return None


def _verdict(champion: Version, serving: Version | None, examine: Examine) -> tuple[str, str | None]:
    """The table's entry about the gate, and the reason for a refusal, or None."""
    against = str(serving.number) if serving else tags.NO_VERSION
    # A version that was in force needs no gate: going back must be possible from a version that scores better, too.
    found = examine(champion, "" if tags.PROMOTED in champion.tags else against)
    if not found.sound:
        return "", "; ".join(found.reasons) or "it does not answer as it did when it was registered"
    if instead := _stands_in_for_gate(champion):
        newer = serving is not None and champion.number > serving.number
        return ("again in force" if instead == "rollback" and newer else instead), None
    if found.gate == "passed":
        return "passed", None
    return "", "; ".join([_gate_says(found.gate), *found.reasons])


def _stands_in_for_gate(version: Version) -> str:
    if tags.PROMOTED in version.tags:
        return "rollback"
    reason = version.tags.get(tags.OVERRIDE, "").strip()
    return f"override: {reason}" if reason else ""


def _gate_says(gate: str) -> str:
    return f"its gate says `{gate or 'not taken'}` (its page says why; a tag `override` with a reason lets it pass)"


def _is_unchanged(registry: RegistrySnapshot) -> bool:
    """Whether the registry still is as it was judged."""
    return read_registry(registry.name).decisive() == registry.decisive()


# ------------------------------------------------------------------------------------------------------- the writes


def _refuse(registry: RegistrySnapshot, champion: Version, reason: str, tell: Tell) -> Outcome | None:
    serving = registry.at(SERVING)
    # The reason first, so that a champion is never set back without one.
    versions.set_tags(champion, {tags.REFUSED: f"{_now()} {reason}"})
    if not _is_unchanged(registry):
        return None
    if serving:
        versions.set_alias(serving, CHAMPION)
        now = f"version {serving.number} stays in force, and is `champion` again"
    else:
        versions.delete_alias(registry.name, CHAMPION)
        now = "nothing is in force"
    message = f"{registry.name}: version {champion.number} is refused: {reason}; {now}"
    outcome = Outcome("refused", message, champion.number)
    tell(outcome)
    return outcome


def _promote(registry: RegistrySnapshot, champion: Version, verdict: str, tell: Tell, root: Path) -> Outcome | None:
    serving = registry.at(SERVING)
    journal = _begin(champion, serving, registry.at(PREVIOUS), verdict)
    for version, alias in ((serving, PREVIOUS), (champion, SERVING)):
        if not _is_unchanged(registry):
            return None  # the next run finds the journal and takes it back
        if version:
            versions.set_alias(version, alias)
    return _complete(champion, journal, tell, root)


def _begin(version: Version, serving: Version | None, previous: Version | None, verdict: str) -> _Journal:
    """Writes the journal."""
    journal = _Journal(
        when=_now(),
        instead_of=serving.number if serving else None,
        previous=previous.number if previous else None,
        by=_approver(version),
        verdict=verdict,
    )
    versions.set_tags(version, {tags.PROMOTING: json.dumps(asdict(journal))})
    return journal


def _journal(version: Version) -> _Journal | None:
    """None where the tag is not ours: anybody may set one."""
    try:
        return _Journal(**json.loads(version.tags[tags.PROMOTING]))
    except (ValueError, TypeError):
        return None


def _approver(version: Version) -> str:
    """The tag `approved_by`, unless it is left from an earlier promotion: MLflow does not record who clicks."""
    by = one_line(version.tags.get(tags.APPROVED_BY, ""))  # in the table's form, to be compared with it
    earlier = [each for each in promotions(versions.model_description(version.name)) if each.version == version.number]
    # The last promotion that was approved: later ones with the same tag were found not to be.
    last = next((each.by for each in earlier if each.by), "")
    return "" if last == by else by


def _journalled(registry: RegistrySnapshot) -> Version | None:
    """A version whose promotion was begun; one that is not in force comes first, to be taken back."""
    begun = [version for version in registry.versions if tags.PROMOTING in version.tags]
    return next((version for version in begun if SERVING not in version.aliases), begun[0] if begun else None)


def _take_back(registry: RegistrySnapshot, version: Version, journal: _Journal) -> None:
    """Takes a promotion back: before `serving`, it has written at most `previous`."""
    before = next((each for each in registry.versions if each.number == journal.previous), None)
    if before:
        versions.set_alias(before, PREVIOUS)
    elif registry.at(PREVIOUS):
        versions.delete_alias(registry.name, PREVIOUS)
    versions.delete_tag(version, tags.PROMOTING)


def _complete(version: Version, journal: _Journal, tell: Tell, root: Path) -> Outcome:
    """Writes everything that follows from the alias `serving`."""
    versions.set_tags(version, {tags.PROMOTED: journal.when})
    if tags.REFUSED in version.tags:
        versions.delete_tag(version, tags.REFUSED)
    problem = _tag_commit(version, root)
    entry = Promotion(journal.when, version.number, journal.instead_of, journal.by, journal.verdict)
    description = versions.model_description(version.name)
    if (text := with_promotion(description, version.name, entry)) != description:
        versions.describe_model(version.name, text)
    instead = f" instead of version {entry.instead_of}" if entry.instead_of else ""
    message = f"{version.name}: version {version.number} is in force{instead} ({entry.verdict}){problem}"
    outcome = Outcome("promoted", message, version.number)
    tell(outcome)
    versions.delete_tag(version, tags.PROMOTING)
    return outcome


def _tag_commit(version: Version | None, root: Path) -> str:
    """Sets the git tag `champion` on the commit of the version in force; returns the problem, if there is one.

    A problem does not stop the promotion: the tag is a convenience, and the next run tries again. Where nothing is in
    force, or the commit is unknown, the tag is removed.
    """
    commit, problem = version.commit if version else "", ""
    tag = f"refs/tags/{GIT_TAG}"
    try:
        if not commit:
            problem = "; it names no commit, so there is no git tag for it"
        elif not commit_of(root, commit):
            problem = f"; no git tag, because this clone lacks its commit {commit}"
            commit = ""
        if (now := commit_of(root, tag)) != commit:
            git(root, "update-ref", *([tag, commit] if commit else ["-d", tag, now]))
    except GitError as error:
        problem = f"; no git tag: {error}"
    return problem


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
