"""The fingerprint: another one for whatever decides bytes, and the same where only what is left out changes."""

import json
from pathlib import Path

import pytest

from stages.runtime.fingerprint import fingerprint


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
