"""The report of a retraining: one line, and a page in Markdown."""

from dataclasses import dataclass, field
from typing import Any

from stages.registry.links import version_link
from stages.registry.versions import Version


@dataclass
class Report:
    """Filled in as the run goes on."""

    model: str = ""
    why: str = ""
    """Why it was trained, or why not."""
    version: Version | None = None
    """What is registered now."""
    is_new: bool = False
    """Whether this retraining registered it, and not an earlier one."""
    commit: str = ""
    branch: str = ""
    base: str = ""
    accepted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Batch -> its part of reports/validation.json."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Delivery -> why validation refused it in this run."""
    left_alone: dict[str, str] = field(default_factory=dict)
    taken_back: str = ""
    marked: list[Version] = field(default_factory=list)
    """The versions that were trained on what was taken back."""
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The report in a sentence or two: the message of the flow's last state."""
        parts = [self._outcome()]
        parts += [f"refused: {name} ({'; '.join(map(_brief, reasons))})" for name, reasons in self.refused.items()]
        parts += [f"left alone: {name} ({_brief(why)})" for name, why in self.left_alone.items()]
        return ". ".join([*parts, *self.notes])

    def page(self, server: str = "") -> str:
        """The report as a page, with links if the registry has an address."""
        parts = [f"# {self._outcome()}", *self._marked(), *self._under_review(server)]
        parts += _list("Accepted", {name: _counts(each) for name, each in self.accepted.items()})
        parts += _list("Refused", {name: "; ".join(reasons) for name, reasons in self.refused.items()})
        parts += _list("Left alone", self.left_alone)
        parts += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(parts) + "\n"

    def worth_telling(self) -> bool:
        """Whether people are notified: of a verdict, a refusal, a batch taken back."""
        return bool(self.version or self.refused or self.taken_back)

    def _outcome(self) -> str:
        if self.version is None:
            what = f"{self.taken_back} was taken back" if self.taken_back else "nothing to do"
            return f"{what}: {self.why}"
        about = f"{self.model} version {self.version.number}: gate {self.version.tags.get('gate', 'not taken')}"
        if not self.is_new:
            what = f"{self.taken_back} was taken back" if self.taken_back else "unchanged"
            return f"{what}: the model made is {about}, registered before"
        back = f", without {self.taken_back}, which was taken back" if self.taken_back else ""
        return f"{about}, under review as challenger{back}"

    def _marked(self) -> list[str]:
        if not self.marked:
            return []
        numbers = ", ".join(str(version.number) for version in self.marked)
        return ["", f"Trained on {self.taken_back}, and tagged `retracted` for it: version {numbers}."]

    def _under_review(self, server: str) -> list[str]:
        if self.version is None:
            return []
        page = version_link(self.model, self.version.number, server)
        where = f"[model card and registry]({page})" if server else f"`make ui`, then `{page}`"
        rows = {
            "review": where,
            "run": f"[figures and curves]({server}/#/runs/{self.version.run_id})" if server else self.version.run_id,
            "trained because": self.why,
            "commit": f"`{self.commit[:12]}` on `{self.branch}`; `git merge {self.branch}` brings it to `{self.base}`",
            "to promote it": f"set the alias `champion` on version {self.version.number}",
        }
        return ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)]


def _brief(reason: str) -> str:
    """A reason of validation without the names of images; the page has them."""
    return reason.partition(" First: ")[0].rstrip(".")


def _counts(batch: dict[str, Any]) -> str:
    text = f"{batch['accepted']:,} images accepted, {batch['quarantined']:,} quarantined"
    if batch["quarantined_by"]:
        text += f" ({', '.join(f'{count} {reason}' for reason, count in batch['quarantined_by'].items())})"
    drifting = [fact["fact"] for fact in batch["drift"] if fact["drifted"]]
    return f"{text}; drift in {', '.join(drifting)}" if drifting else text


def _list(title: str, rows: dict[str, str]) -> list[str]:
    return ["", f"## {title}", *(f"- **{name}**: {text}" for name, text in rows.items())] if rows else []
