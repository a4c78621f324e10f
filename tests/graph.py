"""The graph of dvc.yaml as DVC resolves it: `python -m tests.graph > tests/graph.txt` after a change that is meant."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def resolved() -> str:
    """Every stage with its command, parameters, data dependencies and outputs.

    Code among the dependencies is left out: test_architecture.py computes it.
    """
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return "\n".join(_described(stage) for stage in sorted(repo.index.stages, key=lambda stage: stage.addressing))


def _described(stage: Any) -> str:
    lines = [str(stage.addressing), f"  cmd     {stage.cmd}"]
    for dep in stage.deps:
        if type(dep).__name__ == "ParamsDependency":
            lines += [f"  params  {name}" for name in sorted(dep.params)]
        elif not dep.def_path.startswith("stages/"):
            lines.append(f"  dep     {dep.def_path}")
    for out in stage.outs:
        marks = [
            mark for mark, on in (("not cached", not out.use_cache), ("metric", out.metric), ("plot", out.plot)) if on
        ]
        lines.append(f"  out     {out.def_path}" + (f"  ({', '.join(marks)})" if marks else ""))
    return "\n".join([lines[0], *sorted(lines[1:]), ""])


if __name__ == "__main__":
    sys.stdout.write(resolved())
