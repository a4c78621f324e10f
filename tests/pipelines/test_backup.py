"""Backup and restore of a small registry; a model answers from the new place when the old one is gone."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import backup
from stages.registry import logged_models, versions
from stages.registry.client import open_client
from stages.runtime.command import StageError

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
from pathlib import Path
import mlflow, pandas as pd

class Echo(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.word = Path(context.artifacts["model"], "word").read_text()

    def predict(self, context, model_input, params=None):
        return pd.DataFrame({"name": [[self.word]] * len(model_input)})

mlflow.models.set_model(Echo())
"""
ASK = """
from stages.registry import artifacts, versions
from stages.registry.client import open_client
open_client()
import mlflow, pandas as pd
print(mlflow.pyfunc.load_model("models:/bells@serving").predict(pd.DataFrame({"image": [b"x"]}))["name"][0][0])
version = versions.list_versions("bells")[0]
from pathlib import Path
print(artifacts.download(version.run_id, "reports/note.txt", Path(".")).read_text())
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with a registered model."""
    root = tmp_path_factory.mktemp("old place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (root / "model").mkdir()
        (root / "model/word").write_text("ding")
        (root / "code.py").write_text(MODEL)
        client = open_client()
        run = client.create_run(client.create_experiment("synset/finetune"))
        client.log_text(run.info.run_id, "a note", "reports/note.txt")
        source = logged_models.log_model(run, root / "code.py", root / "model", {"name": "string"}, [], {})
        version = versions.create_version("bells", "About", source, run.info.run_id, {}, "Card")
        versions.set_alias(version, "serving")
        yield root


@pytest.fixture
def file(registry: Path, tmp_path: Path) -> Path:
    """A backup of it."""
    backup.back_up(*backup.places(), tmp_path / "registry.tar")
    return tmp_path / "registry.tar"


def place(folder: Path) -> tuple[Path, Path]:
    """Database and artifacts of a checkout."""
    return folder / "mlflow.db", folder / "mlartifacts"


def test_a_model_answers_from_another_folder_when_the_first_is_gone(registry: Path, file: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    hidden = registry.rename(registry.with_name("hidden"))
    try:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-m", "pipelines.backup", "--restore", str(file)]
        said = subprocess.run(command, cwd=new, env=environment, check=True, capture_output=True, text=True)
        assert said.stdout.startswith(f"restored {new}/mlflow.db and {new}/mlartifacts")
        answer = subprocess.run([sys.executable, "-c", ASK], cwd=new, env=environment, capture_output=True, text=True)
        assert answer.stdout.split("\n")[:2] == ["ding", "a note"], answer.stderr
    finally:
        hidden.rename(registry)
    with sqlite3.connect(new / "mlflow.db") as db:
        assert not [line for line in db.iterdump() if str(registry) in line and "VALUES('mlflow.source" not in line]
    assert not (new / ".synset/restore").exists()


def test_nothing_is_overwritten(registry: Path, file: Path) -> None:
    with pytest.raises(StageError, match=r"mlflow\.db exists and is not overwritten"):
        backup.restore(file, *place(registry))
    with pytest.raises(StageError, match=r"registry\.tar exists and is not overwritten"):
        backup.back_up(*place(registry), file)


def test_it_does_not_hold_itself(registry: Path) -> None:
    with pytest.raises(StageError, match=r"x\.tar lies in .*mlartifacts and would hold itself"):
        backup.back_up(*place(registry), registry / "mlartifacts/backups/x.tar")
    assert not (registry / "mlartifacts/backups").exists()


def test_the_journal_of_another_database_is_not_applied_to_the_restored_one(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mlflow.db-wal").write_text("of the one that was moved away")
    with pytest.raises(StageError, match=r"mlflow\.db-wal exists and is not overwritten; move it away"):
        backup.restore(file, *place(target))


@pytest.mark.parametrize(
    "damage", ["cut off", "cut off between files", "empty", "another file", "no tar", "a folder", "no file"]
)
def test_what_is_no_whole_backup_leaves_nothing_behind(file: Path, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    if damage == "cut off":
        with file.open("r+b") as content:
            content.truncate(file.stat().st_size * 2 // 3)
    elif damage == "cut off between files":
        with tarfile.open(file) as tar:
            last = tar.getmembers()[-1].offset
        with file.open("r+b") as content:
            content.truncate(last)
    elif damage == "empty":
        tarfile.open(file, "w").close()
    elif damage == "another file":
        with tarfile.open(file, "w") as tar:
            tar.add(__file__, "mlflow.db")
    elif damage == "no tar":
        file.write_text("hello")
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
    with pytest.raises(StageError, match=r"no whole backup \(.*\); nothing|there is no file"):
        backup.restore(file, *place(target))
    assert [path.name for path in target.rglob("*")] in ([], [".synset"])


def test_a_backup_that_fails_leaves_no_file(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup, "_write_tar", full)
    with pytest.raises(OSError, match="No space"):
        backup.back_up(*place(registry), tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StageError, match="to back up"):
        backup.back_up(*place(tmp_path), tmp_path / "x.tar")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_restore_that_was_killed_is_done_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    class KilledError(BaseException):
        pass

    target = tmp_path / "target"
    target.mkdir()
    done, real = 0, Path.replace

    def dying(self: Path, to: Path) -> Path:
        nonlocal done
        if done == renames:
            raise KilledError
        done += 1
        return real(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        patch.setattr(backup, "shutil", None)  # a killed process removes nothing
        with pytest.raises((KilledError, AttributeError)):
            backup.restore(file, *place(target))
    if renames < 2:
        assert not (target / "mlflow.db").exists()
        backup.restore(file, *place(target))
    assert sorted(path.name for path in target.iterdir() if path.name != ".synset") == ["mlartifacts", "mlflow.db"]
    with tarfile.open(file) as tar:
        wanted = {name for name in tar.getnames() if name.startswith("mlartifacts/")}
    assert {path.relative_to(target).as_posix() for path in (target / "mlartifacts").rglob("*")} == wanted


def test_a_database_that_is_being_written_is_consistent_in_the_backup(registry: Path, tmp_path: Path) -> None:
    with sqlite3.connect(registry / "mlflow.db") as writer:
        writer.execute("insert into experiment_tags values ('half', 'done', 0)")
        backup.back_up(*place(registry), tmp_path / "x.tar")
        writer.rollback()
    (tmp_path / "target").mkdir()
    backup.restore(tmp_path / "x.tar", *place(tmp_path / "target"))
    with sqlite3.connect(tmp_path / "target/mlflow.db") as db:
        assert db.execute("select count(*) from experiment_tags where key = 'half'").fetchone() == (0,)


def test_artifacts_in_other_places_are_named(registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(registry / "mlflow.db", tmp_path / "mlflow.db")
    backup.back_up(*place(tmp_path), tmp_path / "x.tar")
    assert f"the artifacts of 1 runs lie elsewhere and are not in it, for example {registry}" in caplog.text


def test_a_server_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://registry:5000")
    with pytest.raises(StageError, match="whose keeper backs up"):
        backup.places()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://registry/mlflow")
    with pytest.raises(StageError, match="this backs up SQLite"):
        backup.places()
