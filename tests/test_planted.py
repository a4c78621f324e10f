"""The planted dirt of the sample is found, all of it and nothing else, with another seed than the default one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from stages.data.sources.sample import BAD_KINDS, planted
from stages.runtime.tables import read_table
from tests.workspace import ROOT

SEED = 11
REASONS = {
    "truncated": {"decodes"}, "zero_byte": {"not_empty"}, "one_pixel": {"large_enough"}, "text": {"known_format"},
    "duplicate": {"no_exact_duplicate", "no_leak_of_test"}, "near_duplicate": {"no_near_duplicate", "no_leak_of_test"},
}  # fmt: skip


def test_validate_quarantines_exactly_what_was_planted(tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, batch in params["batches"].items():
        assert batch["source"] == f"sample:{name}?seed=1"
        batch["source"] = f"sample:{name}?seed={SEED}"
    shutil.copy(ROOT / "dvc.yaml", tmp_path)  # work in progress is known by what a stage depends on
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    steps = ["ingest upstream", "ingest target", "scan upstream", "scan target", "validate"]
    for stage, *batch in map(str.split, steps):
        subprocess.run([sys.executable, "-m", f"stages.{stage}", *batch], cwd=tmp_path, env=environment, check=True)
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
