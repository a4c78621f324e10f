"""How easy the code is to enter, in figures with a limit each: `python -m tests.counts` prints the table."""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "modules in stages/": 12,
    "lines of the longest module in stages/": 80,
    "imports inside functions": 40,
    "TYPE_CHECKING blocks": 8,
    "# fmt: skip": 15,
    "class names used twice": 0,
    "functions with more than 8 parameters": 0,
    "code dependencies in dvc.yaml": 60,
    "lines of Python in stages/ and pipelines/": 29_600,  # the reading of sources as people bring them took 4,000
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def figures() -> dict[str, int]:
    """Every figure of LIMITS, counted over stages/ and pipelines/ as they are in the working tree."""
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files()}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    runnable = [path for path in texts if path.parent == Path("stages")]
    return {
        "modules in stages/": len(runnable),
        "lines of the longest module in stages/": max(texts[path].count("\n") for path in runnable),
        "imports inside functions": sum(len(list(lazy_imports(tree))) for tree in trees.values()),
        "TYPE_CHECKING blocks": sum(text.count("\nif TYPE_CHECKING:") for text in texts.values()),
        "# fmt: skip": sum(text.count("# fmt: skip") for text in texts.values()),
        "class names used twice": len(classes_of_one_name(trees)),
        "functions with more than 8 parameters": len(list(long_signatures(trees))),
        "code dependencies in dvc.yaml": len(code_dependencies()),
        "lines of Python in stages/ and pipelines/": sum(text.count("\n") for text in texts.values()),
    }


def python_files() -> list[Path]:
    """Python files of stages/ and pipelines/ that git tracks or would add, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "stages", "pipelines"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(Path(name) for name in names if name.endswith(".py") and (ROOT / name).is_file())


def lazy_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements inside functions."""
    seen: set[ast.AST] = set()
    for function in ast.walk(tree):
        if isinstance(function, Function):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom) and node not in seen:
                    seen.add(node)
                    yield node


def classes_of_one_name(trees: dict[Path, ast.Module]) -> dict[str, list[Path]]:
    """Names that several classes have, at the top of modules, with the modules."""
    homes = [(node.name, path) for path, tree in trees.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    times = Counter(name for name, _ in homes)
    return {name: [path for other, path in homes if other == name] for name, n in times.items() if n > 1}


def long_signatures(trees: dict[Path, ast.Module]) -> Iterator[tuple[Path, str, int]]:
    """Functions and methods with more than 8 parameters, `self` and keyword-only ones counted."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                a = node.args
                count = len([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))])
                if count > 8:
                    yield path, node.name, count


def code_dependencies() -> list[str]:
    """Entries of dvc.yaml's `deps` that name code, once for each stage."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    return [dep for stage in stages for dep in stage.get("do", stage).get("deps", []) if re.match("stages/", dep)]


if __name__ == "__main__":
    for name, value in figures().items():
        print(f"{'' if value <= LIMITS[name] else 'OVER':4}  {value:6,}  of at most {LIMITS[name]:6,}  {name}")
