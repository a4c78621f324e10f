"""The table of promotions in a registered model's description: the history that MLflow itself does not keep.

MLflow knows where an alias points now, and not where it pointed before, since when, or why. The text around the table
is its readers' own and stays as it is.
"""

import html
import logging
import re
from dataclasses import dataclass
from itertools import takewhile

from stages.registry.links import version_link

logger = logging.getLogger(__name__)

HEADING = "## Promotions"
HEAD = ("| When (UTC) | Version | Instead of | Approved by | Verdict |", "|---|---|---|---|---|")
LONGEST = 5000
"""Characters that MLflow's databases hold of a description."""
LEFT_OUT = "Older ones are left out; the tag `promoted` of a version says when it last came into force."
_LINE = re.compile(r"\| (?P<when>[^|]+) \| \[(?P<version>\d+)\]\([^|]*\) \| (?P<instead_of>\d*) *\| (?P<rest>.*) \|")
_SPECIAL = re.compile(r"[\\`*_\[\]|]")
_CELLS = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class Promotion:
    """A version came into force."""

    when: str
    """UTC, ISO 8601, to the second."""
    version: int
    instead_of: int | None
    """The version that was in force before it."""
    by: str
    """From the tag `approved_by`; empty where nobody said."""
    verdict: str
    """Why it could: what the gate said, or what stood in for it."""


def one_line(text: str) -> str:
    """A person's words as the table keeps them: on one line, and not more than fit in a cell."""
    return " ".join(text.split())[:300].strip()


def promotions(description: str) -> list[Promotion]:
    """What the table holds, newest first; lines that are none of ours are passed over."""
    return [found for line in _parts(description)[1] if (found := _read(line))]


def with_promotion(description: str, name: str, promotion: Promotion) -> str:
    """The description with a line for `promotion` on top of the table; unchanged where the table has it already.

    Where it would become longer than a description may be, the oldest lines go; where what people wrote leaves no room
    for a single one, nothing is written: a database that refuses it would stop every promotion after this one.
    """
    # Only the newest can be this one, from a run that was killed: an older line may be of the same second.
    same = (promotion.when, promotion.version, promotion.instead_of)
    if [(each.when, each.version, each.instead_of) for each in promotions(description)[:1]] == [same]:
        return description
    before, lines, after = _parts(description)
    lines = [_line(name, promotion), *lines]
    whole = _joined(before, lines, after)
    while len(whole) > LONGEST and len(lines) > 1:
        lines.pop()
        whole = _joined(before, lines, [LEFT_OUT, *(line for line in after if line != LEFT_OUT)])
    if len(whole) > LONGEST:
        logger.warning("warning: the description of %s is too long for the table of promotions; shorten it", name)
        return description
    return whole


def _parts(description: str) -> tuple[list[str], list[str], list[str]]:
    """Lines before the table's heading, the table's own, and lines after it."""
    lines = description.strip().splitlines()
    if HEADING not in lines:
        return lines, [], []
    start = lines.index(HEADING)
    rest = lines[start + 1 :]
    # Ours is the one with our head, up to its first other line: one further down is somebody else's.
    begin = rest.index(HEAD[0]) if HEAD[0] in rest else len(rest)
    table = list(takewhile(lambda line: line.startswith("|"), rest[begin:]))
    return lines[:start], [line for line in table if line not in HEAD], rest[:begin] + rest[begin + len(table) :]


def _joined(before: list[str], table: list[str], after: list[str]) -> str:
    text = ["\n".join(before).strip(), "\n".join([HEADING, "", *HEAD, *table]), "\n".join(after).strip()]
    return "\n\n".join(part for part in text if part) + "\n"


def _line(name: str, promotion: Promotion) -> str:
    version = f"[{promotion.version}]({version_link(name, promotion.version)})"
    when = promotion.when.replace("T", " ").removesuffix("+00:00")
    before = "" if promotion.instead_of is None else str(promotion.instead_of)
    return f"| {when} | {version} | {before} | {_cell(promotion.by)} | {_cell(promotion.verdict)} |"


def _cell(text: str) -> str:
    """A person's words as one cell, shown as they were written: no end of line, no bar, no Markdown, no HTML."""
    words = html.escape(one_line(text), quote=False)
    return _SPECIAL.sub(r"\\\g<0>", words)


def _read(line: str) -> Promotion | None:
    match = _LINE.fullmatch(line.strip())
    cells = _CELLS.split(match["rest"]) if match else []
    if not match or len(cells) != 2:
        return None
    by, verdict = (html.unescape(re.sub(r"\\(.)", r"\1", cell)).strip() for cell in cells)
    when = match["when"].replace(" ", "T") + "+00:00"
    instead_of = int(match["instead_of"]) if match["instead_of"] else None
    return Promotion(when, int(match["version"]), instead_of, by, verdict)
