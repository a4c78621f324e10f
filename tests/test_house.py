"""The house: two commands, one environment, and nothing in git that does not belong there."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines import environment
from tests.closure import DISTRIBUTIONS, KINDS, ROOT, imports

BARE = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def tracked() -> list[Path]:
    """Files in git, and those that the next `git add` would bring."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """Its text; nothing for a picture."""
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def readme() -> str:
    """README.md."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def locked_versions() -> dict[str, set[str]]:
    """Every distribution in the lock; several versions where they depend on the Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^ ;]+)", text_of(Path("requirements.lock")), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


# ------------------------------------------------------------------------------------------------------- what is in git


def test_no_file_names_a_place_on_a_machine() -> None:
    place = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|work|workspace)/\w")
    found = [f"{path}: {match[0]}" for path in tracked() for match in place.finditer(text_of(path))]
    assert not found
    assert not [path for path in tracked() if len(str(ROOT)) > 8 and str(ROOT) in text_of(path)]


def test_no_file_names_a_package_index() -> None:
    # The brackets keep the pattern from finding itself.
    host = re.compile(r"pypi[.]org|python[h]osted|(?<!no-emit-)index[-]url|find[-]links")
    assert not [path for path in tracked() if host.search(text_of(path))]


def test_no_data_is_in_git() -> None:
    names = [path for path in tracked() if re.search(r"n\d{8}|\.(JPEG|tar|parquet|safetensors|db)$", path.as_posix())]
    assert not names
    pictures = [path for path in tracked() if path.suffix in {".png", ".jpg", ".jpeg", ".webp"}]
    assert all(path.parts[0] == "docs" for path in pictures)


def test_files_are_small() -> None:
    large = {path.as_posix() for path in tracked() if (ROOT / path).stat().st_size > 500_000}
    assert large <= {"requirements.lock"}


def test_outputs_are_ignored_by_the_root_alone() -> None:
    nested = [path for path in tracked() if path.name == ".gitignore" and path.parts[0] not in (".gitignore", ".dvc")]
    assert not nested, "DVC counts a nested .gitignore as data"
    assert {Path(f"data/shards/{role}/.gitkeep") for role in ("pretrain", "finetune")} <= set(tracked())


# ------------------------------------------------------------------------------------------------------------- the lock


def test_the_lock_is_of_pyproject_and_has_every_hash() -> None:
    project = tomllib.loads(text_of(Path("pyproject.toml")))
    versions = locked_versions()
    for line in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]:
        wanted = Requirement(line)
        found = versions.get(canonicalize_name(wanted.name), set())
        assert found, f"{line} is not in the lock: make lock"
        assert all(map(wanted.specifier.contains, found)), f"{line}, locked {found}: make lock"
    packages = re.split(r"^(?=[\w.-]+==)", text_of(Path("requirements.lock")), flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in package for package in packages)
    assert "://" not in text_of(Path("requirements.lock"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_versions_that_stages_depend_on_are_the_locked_and_installed_ones(kind: str) -> None:
    for line in text_of(Path(f"stages/versions/{kind}.txt")).splitlines():
        name, version = line.split("==")
        assert locked_versions()[name] == {version}, "make lock"
        assert importlib.metadata.version(name) == version, "make setup"


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads(text_of(Path("pyproject.toml")))["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    files = [path for path in tracked() if path.suffix == ".py" and path.parts[0] in ("stages", "pipelines")]
    names = {name.split(".")[0] for path in files for name in imports(path)}
    names -= {"stages", "pipelines"} | set(sys.stdlib_module_names)
    assert {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names} <= declared


# ------------------------------------------------------------------------------------------------------ the environment


def make(*arguments: str, **extra: str) -> "subprocess.CompletedProcess[str]":
    """`make` in the root with little in its environment."""
    command = ["make", "--silent", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=BARE | extra, capture_output=True, text=True)


def exported(output: str) -> dict[str, str]:
    """What `env` printed."""
    return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)


def test_make_flows_and_an_activated_shell_have_the_same_settings() -> None:
    settings = environment.settings()
    assert settings["DVC_SITE_CACHE_DIR"] == f"{ROOT}/.synset/dvc"
    by_make = exported(make("--eval=show: ; @env", "show").stdout)
    assert settings.items() <= by_make.items()
    script = environment.shell_lines() + "\nenv"
    activated = subprocess.run(["sh", "-euc", script], env=BARE, capture_output=True, text=True, check=True)
    assert settings.items() <= exported(activated.stdout).items()


def test_a_setting_of_the_user_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    environment.apply()
    assert os.environ["PREFECT_HOME"] == str(tmp_path)
    assert exported(make("--eval=show: ; @env", "show", PREFECT_HOME="/x").stdout)["PREFECT_HOME"] == "/x"
    script = environment.shell_lines() + "\nenv"
    activated = subprocess.run(["sh", "-c", script], env=BARE | {"PREFECT_HOME": "/x"}, capture_output=True, text=True)
    assert exported(activated.stdout)["PREFECT_HOME"] == "/x"


def test_every_place_is_in_the_checkout() -> None:
    places = [value for name, value in environment.settings().items() if "/" in value]
    assert len(places) >= 5
    assert all(place.startswith(f"{ROOT}/.synset/") for place in places)


def test_dvc_sends_nothing_and_copies_nothing_it_can_link() -> None:
    config = text_of(Path(".dvc/config"))
    assert "analytics = false" in config
    assert 'type = "reflink,hardlink,copy"' in config


# ---------------------------------------------------------------------------------------------------- commands


def test_make_help_names_every_target() -> None:
    listed = set(re.findall(r"^make (\w+)", make("help").stdout, re.MULTILINE))
    assert {"setup", "lock", "repro", "test", "lint", "ui", "clean"} <= listed


def test_make_says_what_it_needs_where_no_python_fits() -> None:
    ended = make("uv", "PYTHON=")
    assert ended.returncode != 0
    assert "error: no Python 3.11 or newer" in ended.stderr


def test_make_clean_keeps_what_cannot_be_made_again(tmp_path: Path) -> None:
    for name in ("Makefile", "environment.mk", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    kept = ["mlflow.db", ".dvc/cache/00", ".synset/retrain/retract.json"]
    for name in [*kept, ".venv/bin/python", ".synset/retrain/tree/params.yaml", ".synset/prefect/prefect.db"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for _ in range(2):
        subprocess.run(["make", "--silent", "clean"], cwd=tmp_path, env=BARE, check=True)
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {*kept, "Makefile", "environment.mk", "requirements.lock"}


def test_an_environment_is_made_again_only_when_the_lock_changed(tmp_path: Path) -> None:
    for name in ("Makefile", "environment.mk", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    locked = subprocess.run(
        "cksum < requirements.lock", shell=True, cwd=tmp_path, capture_output=True, text=True
    ).stdout
    (tmp_path / ".venv/.locked").write_text(f"{locked.strip()} {tmp_path.resolve()}\n")

    def setup() -> "subprocess.CompletedProcess[str]":
        # Without a Python, making the environment fails at once.
        return subprocess.run(["make", "setup", "PYTHON="], cwd=tmp_path, env=BARE, capture_output=True, text=True)

    assert setup().returncode == 0
    with (tmp_path / "requirements.lock").open("a") as lock:
        lock.write("# another line\n")
    assert "no Python" in setup().stderr


def test_a_new_environment_is_never_made_from_the_one_that_it_replaces(tmp_path: Path) -> None:
    for name in ("Makefile", "environment.mk", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python3.13").symlink_to(sys.executable)  # a setup that was cut off before dvc was there
    path = os.pathsep.join([str(tmp_path.resolve() / ".venv/bin"), BARE["PATH"]])  # as the outer make leaves it
    asked = ["make", "--silent", "--eval", "asked:; @echo it is $(PYTHON)", "asked"]
    found = subprocess.run(asked, cwd=tmp_path, env=BARE | {"PATH": path}, capture_output=True, text=True)
    assert found.stdout.startswith("it is ") and str(tmp_path.resolve()) not in found.stdout


def test_ci_stops_at_the_first_failure(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text("lint:\n\t@exit 3\ntest:\n\t@touch tested\n")
    assert subprocess.run([tmp_path / ".ci/run"], cwd="/", env=BARE, capture_output=True).returncode != 0
    assert not (tmp_path / "tested").exists()
    (tmp_path / "Makefile").write_text("lint:\n\t@true\ntest:\n\t@exit 3\n")
    assert subprocess.run([tmp_path / ".ci/run"], cwd="/", env=BARE, capture_output=True).returncode != 0


def test_pre_commit_runs_what_the_lock_installs() -> None:
    hooks = [
        hook for repo in yaml.safe_load(text_of(Path(".pre-commit-config.yaml")))["repos"] for hook in repo["hooks"]
    ]
    assert {"ruff", "ruff-format", "file-size"} <= {hook["id"] for hook in hooks}
    for hook in hooks:
        program = Path(shlex.split(hook["entry"])[0])
        assert program.parent == Path(".venv/bin")
        assert (Path(sys.executable).parent / program.name).is_file()


# ---------------------------------------------------------------------------------------------------- README


def test_the_tree_in_the_readme_is_there() -> None:
    tree = re.search(r"```text\n(.*?)```", readme(), re.DOTALL)
    assert tree, "README.md has no ```text tree"
    folders: list[str] = []
    paths = []
    for line in tree[1].splitlines():
        depth, names = (len(line) - len(line.lstrip())) // 2, line.split("  ")
        entries = next(part for part in names if part.strip()).split()
        paths += ["".join(folders[:depth]) + entry for entry in entries]
        folders = [*folders[:depth], entries[0] if entries[0].endswith("/") else ""]
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_commands_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", make("help").stdout, re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", "".join(re.findall(r"```sh\n(.*?)```", readme(), re.DOTALL)))) <= targets
    for module in set(re.findall(r"python -m ((?:stages|pipelines)\.[a-z_.]+)", readme())):
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), module


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in readme()
    assert text_of(Path(".ci/run")).rstrip().endswith("make test")


def test_links_between_documents_lead_somewhere() -> None:
    for path in [path for path in tracked() if path.suffix == ".md"]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text_of(path)):
            assert (ROOT / path.parent / target).exists(), f"{path}: {target}"
