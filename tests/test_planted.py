"""The planted dirt of the sample is found, all of it and nothing else, with another seed than the default one."""

import shutil
from pathlib import Path

import pytest
import yaml

from stages import ingest, scan, validate
from stages.data.sources.sample import BAD_KINDS, planted
from stages.runtime.tables import read_table
from tests.workspace import ROOT

SEED = 11
REASONS = {
    "truncated": {"decodes"}, "zero_byte": {"not_empty"}, "one_pixel": {"large_enough"}, "text": {"known_format"},
    "duplicate": {"no_exact_duplicate", "no_leak_of_test"}, "near_duplicate": {"no_near_duplicate", "no_leak_of_test"},
}  # fmt: skip


def test_validate_quarantines_exactly_what_was_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, batch in params["batches"].items():
        assert batch["source"] == f"sample:{name}?seed=1"
        batch["source"] = f"sample:{name}?seed={SEED}"
    shutil.copy(ROOT / "dvc.yaml", tmp_path)  # work in progress is known by what a stage depends on
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    batches = ["upstream", "target"]
    for main, arguments in [(ingest.main, batches), (scan.main, batches), (validate.main, [""])]:
        for argument in arguments:
            monkeypatch.setattr("sys.argv", ["stage", *filter(None, [argument])])
            main()
    kinds = {
        f"{name}/{path}": kind
        for name in params["batches"]
        for path, kind in planted(name, SEED).items()
        if kind in BAD_KINDS
    }
    found = read_table(tmp_path / "data/quarantine.parquet").set_index("key")["reason"].to_dict()
    assert found.keys() == kinds.keys()
    assert set(kinds.values()) == BAD_KINDS
    assert all(found[key] in REASONS[kind] for key, kind in kinds.items())
