"""The table of promotions in a registered model's description: the history that MLflow itself does not keep.

MLflow knows where an alias points now, but not where it pointed before, since when, or why. The text around the table
belongs to people and stays as it is.
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
"""Longest description that MLflow's databases hold, in characters."""
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
    """From the tag `approved_by`; may be empty."""
    verdict: str
    """Why it was promoted: the gate's verdict, or what replaced it."""


def one_line(text: str) -> str:
    """Text for a cell of the table: on one line, and cut to 300 characters."""
    return " ".join(text.split())[:300].strip()


def promotions(description: str) -> list[Promotion]:
    """The table's entries, newest first; lines of another form are skipped."""
    return [found for line in _parts(description)[1] if (found := _read(line))]


def with_promotion(description: str, name: str, promotion: Promotion) -> str:
    """The description with a line for `promotion` on top of the table; unchanged where the table has it already.

    If it becomes too long, the oldest lines go. If other text leaves no room for a single line, nothing is written: a
    database that refuses it would stop every later promotion.
    """
    # Only the newest line can be this promotion, from a run that was killed; an older one may have the same second.
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
    # Our table begins with our head and ends at the first other line; a table further down is somebody else's.
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
    """Text escaped for one cell: no line end, bar, Markdown or HTML."""
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
