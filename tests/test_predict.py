"""Scoring files, folders and tars: a row an image whatever it is, the whole file or none, in bounded memory."""

import os
import subprocess
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from stages import predict, register
from stages.registry import image_files, versions
from stages.registry.image_files import ImageFile, count_files
from stages.registry.predicting import write_predictions
from stages.runtime.command import StageError
from tests.bells import CLASSES, asked_here, picture, tree_of_bells
from tests.conftest import Once

GOOD = picture(1, 40, 50)


def answers(images: list[bytes], top_k: int) -> pd.DataFrame:
    """A model of three classes that, like the served one, refuses a whole batch for one damaged image."""
    for row, data in enumerate(images):
        if len(data) < 100:
            raise ValueError(f"input {row} of column `image`: a damaged image: {data.decode(errors='replace')}")
    best = [(len(data) % 3, (len(data) + 1) % 3, (len(data) + 2) % 3)[:top_k] for data in images]
    table = {"class_id": best, "name": [[CLASSES[i] for i in row] for row in best]}
    return pd.DataFrame(table | {"probability": [[0.5, 0.3, 0.2][:top_k] for _ in best]})


def write(path: Path, data: bytes = GOOD) -> Path:
    """A file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def pack(path: Path, folder: Path, mode: str = "w:") -> Path:
    """A tar of a folder's files."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for file in sorted(folder.rglob("*")):
            tar.add(file, file.relative_to(folder).as_posix(), recursive=False)
    return path


def rows(out: Path, *sources: Path, top_k: int = 2, batch_size: int = 4) -> pd.DataFrame:
    """What was written, by the last part of the path."""
    total = sum(map(count_files, sources))
    write_predictions(list(sources), total, answers, out, top_k, batch_size)
    table = pd.read_parquet(out) if out.suffix == ".parquet" else pd.read_csv(out, keep_default_na=False)
    return table.set_index(table["path"].str.rpartition("/")[2])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_every_image_has_a_row_and_a_damaged_one_says_why(tmp_path: Path, suffix: str) -> None:
    for i in range(9):
        write(tmp_path / f"in/{i}.jpg", GOOD[: len(GOOD) - i])
    write(tmp_path / "in/3.jpg", b"torn")
    write(tmp_path / "in/8.jpg", b"")
    table = rows(tmp_path / f"out.{suffix}", tmp_path / "in")
    assert table.index.tolist() == [f"{i}.jpg" for i in range(9)]
    columns = ["path", "class_id", "name", "probability", "class_id_2", "name_2", "probability_2", "error"]
    assert table.columns.tolist() == columns
    assert table["error"].to_dict() == {f"{i}.jpg": "" for i in range(9)} | {
        "3.jpg": "a damaged image: torn",
        "8.jpg": "a damaged image",
    }
    good = table[table["error"] == ""]
    assert good["class_id"].astype(int).tolist() == [(len(GOOD) - i) % 3 for i in (0, 1, 2, 4, 5, 6, 7)]
    assert good["name"].tolist() == [CLASSES[i] for i in good["class_id"].astype(int)]
    assert set(good["probability"].astype(float)) == {0.5}


def test_no_more_classes_than_there_are(tmp_path: Path) -> None:
    assert "name_3" in rows(tmp_path / "out.csv", write(tmp_path / "a.jpg"), top_k=9)
    assert "name_4" not in pd.read_csv(tmp_path / "out.csv")


def test_folders_and_tars_are_read_with_all_that_is_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "b/deep/er/1.jpeg")
    write(folder / "a/2.PNG")
    write(folder / "nameless")  # an image by content
    write(folder / "a/notes.txt", b"no image")
    write(folder / "a/.hidden.jpg")
    write(folder / ".git/3.jpg")
    inner = tmp_path / "inner"
    write(inner / "x/0001.jpg")
    write(inner / "x/0001.cls", b"00003")
    write(inner / "__MACOSX/._0001.jpg", b"junk")
    write(inner / "x/bad.jpg", b"bad")
    pack(folder / "c.tar", inner)
    pack(folder / "d.tar.gz", inner, "w:gz")
    table = rows(tmp_path / "out.csv", folder)
    assert [path.removeprefix(f"{folder}/") for path in table["path"]] == [
        "c.tar/x/0001.jpg", "c.tar/x/bad.jpg", "d.tar.gz/x/0001.jpg", "d.tar.gz/x/bad.jpg",
        "nameless", "a/2.PNG", "b/deep/er/1.jpeg",
    ]  # fmt: skip


def test_what_cannot_be_opened_has_a_row_and_loops_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    write(folder / "good.jpg")
    write(folder / "huge.jpg", GOOD + bytes(5000))
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe")  # by its name no image, and nobody waits for it to say more
    (folder / os.fsdecode(b"\xff.jpg")).symlink_to("good.jpg")
    inner = tmp_path / "inner"
    write(inner / "a.jpg")
    (inner / "link.jpg").symlink_to("a.jpg")
    pack(folder / "links.tar", inner)
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", len(GOOD) + 10)
    errors = rows(tmp_path / "out.csv", folder)["error"].to_dict()
    assert errors == {
        "good.jpg": "", "a.jpg": "", "\\udcff.jpg": "",
        "huge.jpg": f"{len(GOOD) + 5000} bytes are more than {len(GOOD) + 10}",
        "broken.jpg": "not a file, or a link that leads nowhere",
        "pipe.jpg": "not a file, or a link that leads nowhere",
        "link.jpg": "a link within the tar, which is not followed",
    }  # fmt: skip


def test_a_file_that_is_named_is_asked_about_whatever_it_is(tmp_path: Path) -> None:
    named = write(tmp_path / "report.txt", b"words")
    assert rows(tmp_path / "out.csv", named, write(tmp_path / "a.jpg"))["error"].tolist() == [
        "a damaged image: words",
        "",
    ]


def damaged_tar(folder: Path, how: str) -> Path:
    """A tar of three images, cut or overwritten in the second one."""
    for i in range(3):
        write(folder / f"inner/{i}.jpg")
    path = pack(folder / "some.tar", folder / "inner")
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    with path.open("r+b") as file:
        if how == "overwritten":
            file.seek(second.offset)
            file.write(b"not a header")
        else:
            file.truncate(second.offset_data + 10 if how == "cut in an image" else second.offset + 100)
    return path


def test_sources_without_images_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    write(tmp_path / "text/a.txt", b"text")
    cases = {
        "holds no files": tmp_path / "empty",
        "no such file or folder": tmp_path / "nowhere",
        "no image in": tmp_path / "text",
        "cannot be read as a tar: file could not be opened": write(tmp_path / "fake.tar", b"nonsense"),
        "unexpected end": damaged_tar(tmp_path / "one", "cut in an image"),
        "cannot be read as a tar: it is cut or damaged": damaged_tar(tmp_path / "two", "cut in a header"),
        "it is cut or damaged at byte": damaged_tar(tmp_path / "three", "overwritten"),
    }
    for message, source in cases.items():
        with pytest.raises(StageError, match=message):
            rows(tmp_path / "out.csv", source)
        assert not (tmp_path / "out.csv").exists()


def test_the_whole_file_or_none(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / f"in/{i}.jpg")
    out = write(tmp_path / "out.csv", b"of yesterday\n")
    asked = []

    def dies(images: list[bytes], top_k: int) -> pd.DataFrame:
        asked.append(len(images))
        if len(asked) > 3:
            raise KeyboardInterrupt
        return answers(images, top_k)

    with pytest.raises(KeyboardInterrupt):
        write_predictions([tmp_path / "in"], 10, dies, out, 2, 2)
    assert asked == [1, 2, 2, 2]
    assert out.read_text() == "of yesterday\n"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.csv"}


def test_a_model_that_does_not_answer_is_no_fault_of_the_images(tmp_path: Path) -> None:
    def broken(images: list[bytes], top_k: int) -> pd.DataFrame:
        raise RuntimeError("expected 3 channels")

    with pytest.raises(StageError, match="does not answer, not even to a grey image: expected 3 channels"):
        write_predictions([write(tmp_path / "a.jpg")], 1, broken, tmp_path / "out.csv", 2, 2)
    assert not (tmp_path / "out.csv").exists()


def test_memory_holds_one_batch_and_no_list_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "BATCH_BYTES", 1000)
    found = (ImageFile(str(i), bytes(300)) for i in range(10_000))
    batches = image_files.batches(found, 64)
    assert len(next(batches)) == 4
    assert next(found).path == "4"  # nothing was read ahead
    for i in range(300):
        write(tmp_path / f"in/{i}.jpg", b"x")
    path = pack(tmp_path / "many.tar", tmp_path / "in")
    assert [len(tar.members) for tar, _ in image_files.members(path)] == [0] * 300  # type: ignore[attr-defined]


def test_what_is_written_by_default_is_no_change_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is registered afterwards would otherwise be tagged `git.dirty`."""
    monkeypatch.setattr("sys.argv", ["predict", "photo.jpg"])
    out = predict.parse().out
    assert not out.is_absolute()
    command = ["git", "check-ignore", "--quiet", "--no-index", str(out)]
    assert subprocess.run(command, cwd=Path(predict.__file__).parents[1], check=False).returncode == 0


def test_the_version_in_force_is_asked_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: Once
) -> None:
    with tree_of_bells(tmp_path, once) as tree, asked_here():
        image = write(tree / "photo.jpg")
        command = ["predict", str(image), "--out", "said.parquet"]
        for arguments, message in (
            ((), "there is no registry: .*mlflow.db is missing"),
            (("--out", "said.txt"), "ends in .csv or .parquet"),
            (("--model", "bells"), "'bells' is no registered model"),
        ):
            monkeypatch.setattr("sys.argv", [*command, *arguments])
            with pytest.raises(StageError, match=message):
                predict.main()
        assert not (tree / "mlflow.db").exists()
        monkeypatch.setattr("sys.argv", ["register"])
        register.main()
        for arguments, message in (
            ((), "no version with the alias serving; it has 1 @challenger. One of them: models:/bells/1"),
            (("--model", "models:/bells/7"), "bells has no version 7; it has 1 @challenger"),
            (("--model", "models:/cups@serving"), "has no version of a model called cups"),
        ):
            monkeypatch.setattr("sys.argv", [*command, *arguments])
            with pytest.raises(StageError, match=message):
                predict.main()
        versions.set_alias(versions.list_versions("bells")[0], "serving")
        monkeypatch.setattr("sys.argv", command)
        predict.main()
        (row,) = pd.read_parquet("said.parquet").to_dict("records")
        assert (row["path"], row["error"]) == (str(image), "")
        assert row["name"] == CLASSES[row["class_id"]]
        assert row["probability"] + row["probability_2"] + row["probability_3"] == pytest.approx(1, abs=1e-5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(StageError, match=r"MLflow at http://127\.0\.0\.1:9 failed"):
            predict.main()
