"""The fingerprint: another one for whatever decides bytes, and the same where only what is left out changes."""

import json
from pathlib import Path

import pytest
from dvc.fs import localfs
from dvc.repo import Repo

from stages.runtime.command import StageError
from stages.runtime.fingerprint import dependencies_of, fingerprint


def test_the_fingerprint_changes_with_whatever_decides_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/shards/pretrain/mine").mkdir(parents=True)
    index = tmp_path / "data/shards/pretrain/mine/index.json"
    index.write_text(json.dumps({"sha256": "1"}), encoding="utf-8")
    (tmp_path / "code.py").write_text("one", encoding="utf-8")
    (tmp_path / "params.yaml").write_text("pretrain: {lr: 0.1}\nother: 1\n", encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(
        "stages: {pretrain: {cmd: x, params: [pretrain], deps: [code.py, data/shards/pretrain]}}", encoding="utf-8"
    )
    seen = [fingerprint("pretrain", "cpu")]
    (tmp_path / "params.yaml").write_text("pretrain: {lr: 0.1}\nother: 2\n", encoding="utf-8")
    assert fingerprint("pretrain", "cpu") == seen[0]
    for change in (
        lambda: (tmp_path / "params.yaml").write_text("pretrain: {lr: 0.2}\n", encoding="utf-8"),
        lambda: (tmp_path / "code.py").write_text("two", encoding="utf-8"),
        lambda: index.write_text(json.dumps({"sha256": "2"}), encoding="utf-8"),
    ):
        change()
        seen.append(fingerprint("pretrain", "cpu"))
    seen.append(fingerprint("pretrain", "cuda"))
    assert len(set(seen)) == len(seen)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A graph of one stage for each batch, with a folder of code."""
    monkeypatch.chdir(tmp_path)
    graph = """
        stages:
          scan:
            foreach: ${batches}
            do: {params: ["batches.${key}.role"], deps: ["data/raw/${item.role}/${key}", code, "${model.kind}.py"]}
    """
    (tmp_path / "dvc.yaml").write_text(graph, encoding="utf-8")
    (tmp_path / "params.yaml").write_text("{batches: {mine: {role: pretrain}}, model: {kind: net}}", encoding="utf-8")
    (tmp_path / ".dvcignore").write_text(
        "# not code\nREADME.md\n__pycache__/\n/code/log.py\n.*.tmp\n", encoding="utf-8"
    )
    for path in ("data/raw/pretrain/mine/a.tar", "code/work.py", "code/deep/log.py", "net.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("one", encoding="utf-8")
    return tmp_path


def test_a_folder_counts_with_the_files_that_dvc_sees(project: Path) -> None:
    expected = ["data/raw/pretrain/mine/a.tar", "code/deep/log.py", "code/work.py", "net.py"]
    assert [path.as_posix() for path in dependencies_of("scan@mine")] == expected
    before = fingerprint("scan@mine")
    for path in ("code/README.md", "code/log.py", "code/__pycache__/work.pyc", "data/raw/pretrain/mine/.b.tar.tmp"):
        (project / path).parent.mkdir(exist_ok=True)
        (project / path).write_text("seen by nobody", encoding="utf-8")
    assert fingerprint("scan@mine") == before
    (project / "code/deep/new.py").write_text("more", encoding="utf-8")
    assert fingerprint("scan@mine") != before


def test_it_sees_what_dvc_sees(project: Path) -> None:
    Repo.init(str(project), no_scm=True).close()
    for path in ("code/README.md", "code/log.py", "code/__pycache__/work.pyc", "code/.x.tmp/y"):
        (project / path).parent.mkdir(exist_ok=True)
        (project / path).write_text("seen by nobody", encoding="utf-8")
    with Repo(str(project)) as repo:
        seen = [Path(path).relative_to(project) for path in repo.dvcignore.find(localfs, str(project / "code"))]
    assert sorted(seen) == [path for path in dependencies_of("scan@mine") if path.parts[0] == "code"]


@pytest.mark.parametrize("path", ["net.py", "code/work.py", "data/raw/pretrain/mine/a.tar"])
def test_a_dependency_that_is_not_there_is_an_error(project: Path, path: str) -> None:
    (project / path).unlink()
    (project / "code/deep/log.py").unlink()
    dependency = {"code/work.py": "code"}.get(path, path.removesuffix("/a.tar"))
    with pytest.raises(StageError, match=f"the stage `scan@mine` depends on {dependency}, which is missing"):
        fingerprint("scan@mine")


def test_a_name_that_params_yaml_lacks_is_an_error(project: Path) -> None:
    (project / "params.yaml").write_text("{batches: {mine: {role: pretrain}}}", encoding="utf-8")
    with pytest.raises(StageError, match=r"dvc.yaml: `model.kind` of the stage `scan@mine` is not in params.yaml"):
        fingerprint("scan@mine")
    with pytest.raises(StageError, match=r"dvc.yaml has no stage `shard`"):
        dependencies_of("shard")
