"""The result of `python -m stages.examine`, and the JSON file by which flows get it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.runtime.files import write_json


@dataclass(frozen=True)
class Examination:
    """Whether a version is what was registered, and whether its verdict holds."""

    sound: bool
    """The weights are those that were registered, and predict as they did then."""
    gate: str
    """passed, failed or inconclusive: the verdict against the version in force now, or that of its registration where
    it still holds."""
    retaken: bool
    """The gate was taken again."""
    reasons: tuple[str, ...]
    """Why it is not sound, and each condition of the gate that did not pass."""

    def write(self, path: Path) -> None:
        """As JSON, an object with these fields."""
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> "Examination":
        """What `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return Examination(**values | {"reasons": tuple(values["reasons"])})
