"""The settings of environment.mk for flows: where Prefect and DVC keep their files, no telemetry."""

import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SETTING = re.compile(r"export (\w+) \?= (.*)")


def settings(root: Path = ROOT) -> dict[str, str]:
    """Name and value of every setting in environment.mk, for a checkout at `root`.

    Raises:
        ValueError: a line is neither a setting nor a comment.
    """
    lines = (root / "environment.mk").read_text(encoding="utf-8").splitlines()
    matches = {line: _SETTING.fullmatch(line) for line in lines if line and not line.startswith("#")}
    wrong = [line for line, match in matches.items() if not match]
    if wrong:
        raise ValueError(f"environment.mk: expected `export NAME ?= value`, found {wrong[0]!r}")
    return {match[1]: match[2].replace("$(CURDIR)", str(root)) for match in matches.values() if match}


def apply() -> None:
    """Sets the variables that are not set yet. Call it before Prefect is imported, which reads its settings once."""
    for name, value in settings().items():
        os.environ.setdefault(name, value)
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect itself makes the last folder only
    # Child processes (`dvc`, and the plain `python` of dvc.yaml) come from the same environment as this one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def shell_lines() -> str:
    """The settings as shell code, for .venv/bin/activate."""
    lines = [f": ${{{name}:={shlex.quote(value)}}}; export {name}" for name, value in settings().items()]
    return "\n".join(["# synset", *lines])


if __name__ == "__main__":
    print(shell_lines())
