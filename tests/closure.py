"""What a stage depends on, read from its source: `python -m tests.closure stages.pretrain` checks dvc.yaml by hand.

Every import counts, also one inside a function; only those for type checkers alone do not.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("stages", "pipelines", "tests", "bench")
KINDS = ("data", "evaluation", "training")
"""Of stages/versions/: packages whose versions decide bytes."""

OBSERVERS = frozenset(
    Path(line.strip("/"))
    for line in (ROOT / ".dvcignore").read_text(encoding="utf-8").splitlines()
    if line.startswith("/stages/") and line.endswith(".py")
)
"""Code that decides no byte of an output: it shows progress, takes locks, ends processes, records runs. DVC does not
see it (.dvcignore), so no stage depends on it, nor on what only it imports."""

PAGE_KIT = Path("stages/pages")

# Import name -> name in requirements.lock, where the two differ.
DISTRIBUTIONS = {"PIL": "pillow", "great_expectations": "great-expectations", "nvidia": "nvidia-dali-cuda130"}
DISTRIBUTIONS |= {"sklearn": "scikit-learn", "yaml": "pyyaml", "ruamel": "ruamel-yaml", "cv2": "opencv-python-headless"}


def source_of(module: str) -> Path:
    """The file of `stages.data.raw.facts`, relative to the root."""
    return Path(*module.split(".")).with_suffix(".py")


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports; `from a import b` is `a.b` where that is a module of this project."""
    found: set[str] = set()
    for node in _running_code(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(_module(node.module, alias.name) for alias in node.names)
    return frozenset(found)


def _module(package: str, name: str) -> str:
    return f"{package}.{name}" if (ROOT / source_of(f"{package}.{name}")).is_file() else package


def _running_code(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (each for other in node.orelse for each in (other, *_running_code(other)))
        else:
            yield node
            yield from _running_code(node)


@cache
def named_files(path: Path) -> frozenset[Path]:
    """Files that `path` names in a string and that lie beside it or in the page kit: templates, styles, code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    names = set(re.findall(r"""["']([\w-]+(?:\.[\w-]+)*\.(?:py|j2|css|js|svg))["']""", text))
    names |= {path.stem + suffix for suffix in re.findall(r"""with_suffix\(["']([\w.]+)["']\)""", text)}
    found = {folder / name for folder in (path.parent, PAGE_KIT) for name in names}
    return frozenset(each for each in found if (ROOT / each).is_file())


def closure(module: str) -> set[Path]:
    """Every project file that the module's work depends on, itself included, relative to the root."""
    found: set[Path] = set()
    waiting = [source_of(module)]
    while waiting:
        path = waiting.pop()
        if path in found or path in OBSERVERS:
            continue
        found.add(path)
        waiting += named_files(path)
        if path.suffix == ".py":
            waiting += [source_of(name) for name in imports(path) if name.split(".")[0] in PROJECT]
    return found


def packages(module: str) -> set[str]:
    """Distributions, as the lock calls them, that the module's closure imports."""
    files = [path for path in closure(module) if path.suffix == ".py"]
    names = {name.split(".")[0] for path in files for name in imports(path)}
    return {DISTRIBUTIONS.get(name, name) for name in names - set(PROJECT) - sys.stdlib_module_names}


def locked(kind: str) -> set[str]:
    """Distributions named in stages/versions/<kind>.txt."""
    lines = (ROOT / f"stages/versions/{kind}.txt").read_text(encoding="utf-8").split()
    return {line.split("==")[0] for line in lines}


def versions(module: str) -> set[Path]:
    """The versions files that name a package of the module's closure.

    numpy, which both name, counts only where nothing else does: an upgrade of torch must not rerun the data stages, nor
    one of pandas the training.
    """
    needed, both = packages(module), locked("data") & locked("training")
    kinds = [kind for kind in KINDS if needed & (locked(kind) - both)]
    if not kinds and needed & both:
        kinds = ["data"]
    return {Path(f"stages/versions/{kind}.txt") for kind in kinds}


class Coverage(NamedTuple):
    """How well the code among a stage's `deps` covers what its module uses; all empty is right, but for `surplus`."""

    missing: list[str]
    """Files that the module uses and no dependency covers."""
    twice: list[str]
    """Files that more than one dependency covers."""
    unused: list[str]
    """Dependencies that cover no file that the module uses."""
    surplus: list[str]
    """Code that a folder among the dependencies brings along, although the module does not use it."""


def coverage(module: str, deps: Iterable[str]) -> Coverage:
    """Holds the code among the `deps` of dvc.yaml, files and folders, against the module's closure."""
    used = closure(module) | versions(module)
    covers = {dep: _below(Path(dep)) for dep in deps}
    times = Counter(path for files in covers.values() for path in files)
    return Coverage(
        missing=sorted(path.as_posix() for path in used - times.keys()),
        twice=sorted(path.as_posix() for path, n in times.items() if n > 1),
        unused=sorted(dep for dep, files in covers.items() if not files & used),
        surplus=sorted(path.as_posix() for path in times.keys() - used),
    )


def _below(dep: Path) -> set[Path]:
    """The files that DVC sees in a dependency: the file itself, or what lies below the folder."""
    if not (ROOT / dep).is_dir():
        return {dep}
    files = {path.relative_to(ROOT) for path in (ROOT / dep).rglob("*") if path.is_file()}
    return {path for path in files if path.name != "README.md" and "__pycache__" not in path.parts} - OBSERVERS


def declared(stage: str) -> dict[str, Any]:
    """The stage in dvc.yaml; of a `foreach` stage, what is done for each."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return dict(stages[stage].get("do", stages[stage]))


def declared_code(stage: str) -> list[str]:
    """Code among its `deps`."""
    return [dep for dep in declared(stage).get("deps", []) if dep.startswith("stages/")]


def sections(module: str) -> set[str]:
    """Sections of params.yaml that the closure loads, by their first name (`shard.pretrain` is `shard`)."""
    found = set()
    for path in closure(module):
        # stages/params/ defines the loading; what is loaded is said where it is called.
        if path.suffix == ".py" and path.parts[:2] != ("stages", "params"):
            found |= _loaded(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return found


def _loaded(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in ("load_batches", "load_batch"):
            found.add("batches")
        if name == "load_section":
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            assert isinstance(first, ast.Constant), f"load_section wants a name that can be read: {ast.unparse(node)}"
            found.add(str(first.value).split(".")[0])
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = coverage(name, declared_code(name.removeprefix("stages.")))
        print(f"# {name}: params {', '.join(sorted(sections(name)))}")
        for what, paths in found._asdict().items():
            print(f"{what}:", *(paths or ["nothing"]), sep="\n  ")
