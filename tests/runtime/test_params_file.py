"""params.yaml as people and DVC write it: numbers are numbers, and a value that is none is explained."""

from pathlib import Path

import pytest
from dvc.utils.serialize import modify_yaml

from pipelines.retrain.batch_list import with_batch
from stages.params.all import check_all
from stages.params.finetune import Finetune
from stages.runtime.params_file import ParamsError, load_section, read_params
from tests.workspace import ROOT

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


def written(folder: Path, text: str) -> Path:
    """A params.yaml with `finetune: {epochs: 2, ...}`."""
    (folder / "params.yaml").write_text(f"finetune:\n  epochs: 2\n{text}", encoding="utf-8")
    return folder / "params.yaml"


@pytest.mark.parametrize(("lr", "value"), [("1e-3", 1e-3), ("5E-2", 0.05), (".5", 0.5), ("1", 1)])
def test_a_learning_rate_as_people_write_it(tmp_path: Path, lr: str, value: float) -> None:
    assert load_section("finetune", Finetune, written(tmp_path, f"  lr: {lr}\n")).lr == value


@pytest.mark.parametrize("value", [1e-3, 1e-05, 1e-10, 1e22, 0.1, 3])
def test_a_number_that_dvc_wrote(tmp_path: Path, value: float) -> None:
    path = written(tmp_path, "  lr: 0.1\n")
    with modify_yaml(path) as values:  # as `dvc exp run -S` does it
        values["finetune"]["lr"] = value
    assert load_section("finetune", Finetune, path).lr == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr: .1e3", r"`finetune\.lr`: should be a number that YAML reads as such, got '\.1e3'; write 100"),
        ('lr: "0.1"', r"got '0\.1'; write 0\.1"),
        ("batch_size: 1e2", r"`finetune\.batch_size`: .* got 100\.0; write 100"),
        ("label_smoothing: 10", r"got 10; a share: 10 % is 0\.1"),
        ("lr: 1,5", r"`finetune\.lr`: .*valid number.*'1,5'"),
        ("lr: 010", r"params\.yaml: line 3: `finetune\.lr` has 010, which is 8 .*write 10 \(or 8\)"),
        ("scratch: yes", r"`finetune\.scratch` has yes.*write true"),
    ],
)
def test_what_is_no_number_is_explained(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        load_section("finetune", Finetune, written(tmp_path, f"  {line}\n"))


def test_a_file_that_is_no_text_or_no_sections(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for data, words in ((b"a: \xff", "UTF-8"), (b"[1]", "expected sections"), (b"", "expected sections")):
        path.write_bytes(data)
        with pytest.raises(ParamsError, match=words):
            read_params(path)
    with pytest.raises(ParamsError, match="cannot be read"):
        read_params(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("0 3 * * *", "0 3 * * * *", "no seconds"),
        ("0 3 * * *", "0 3 31 4 *", "never fires"),
        ("interval: 60", "interval: 1:30", "line"),
    ],
)
def test_all_is_checked_before_anything_runs(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TEXT
    (tmp_path / "params.yaml").write_text(TEXT.replace(old, new), encoding="utf-8")
    with pytest.raises(ParamsError, match=words):
        check_all(tmp_path / "params.yaml")


@pytest.mark.parametrize("path", ["params.yaml", *sorted(path.name for path in (ROOT / "presets").glob("*.yaml"))])
def test_of_a_file_of_ours_dvc_changes_one_line_for_one_value(tmp_path: Path, path: str) -> None:
    """In braces it drops quotes that it then misses, and wraps lines: `dvc exp run -S` would fail."""
    before = (ROOT / path if path == "params.yaml" else ROOT / "presets" / path).read_text(encoding="utf-8")
    (tmp_path / path).write_text(with_batch(before, "d-2026-11-23", {"role": "finetune", "source": "2026-11-23"}))
    values, lines = read_params(tmp_path / path), (tmp_path / path).read_text(encoding="utf-8").splitlines()
    with modify_yaml(tmp_path / path) as content:
        content["finetune"]["lr"] = 0.0123
    after = (tmp_path / path).read_text(encoding="utf-8").splitlines()
    assert [new for old, new in zip(lines, after, strict=True) if old != new] == ["  lr: 0.0123"]
    values["finetune"]["lr"] = 0.0123
    assert read_params(tmp_path / path) == values
