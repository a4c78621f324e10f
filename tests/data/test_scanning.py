"""Facts: raw tars are deterministic, and scan says of each file what it is."""

import faulthandler
import hashlib
import io
import os
import signal
import struct
import tarfile
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.data import scanning
from stages.data.raw.facts import FACTS
from stages.data.raw.images import MAX_PIXELS, Header, read_header, to_rgb
from stages.data.raw.tars import members, raw_tars, read_at
from stages.data.scanning import TarPart, image_facts, read_parts, scan_parts, tar_parts
from stages.data.sources.parts import Group, SourceFile
from stages.data.sources.sample import draw
from stages.runtime.command import StageError
from stages.runtime.tables import ROW_GROUP, write_tables
from tests.data.fuzz_scanning import fuzz, seeds_of
from tests.raw_tars import scan_tar, write_tar


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """An image in a format."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def scene() -> Image.Image:
    """A picture with structure, 160x120."""
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize(
        (160, 120), Image.Resampling.BICUBIC
    )


def group(**files: bytes) -> Group:
    return Group("train", "week.1", [SourceFile(f"{n}.JPEG", partial(io.BytesIO, d)) for n, d in files.items()])


def test_the_same_files_make_the_same_tar_and_come_out_again(tmp_path: Path) -> None:
    for place in ("a", "b"):
        assert len(write_tar(group(one=b"first", two=b""), tmp_path / place)) == 2
    first, second = ((tmp_path / place / "train/week.1.tar").read_bytes() for place in ("a", "b"))
    assert first == second
    path = tmp_path / "a/train/week.1.tar"
    assert {each.name: read_at(path, each.offset, each.size) for each in members(path, tmp_path / "a")} == {
        "one.JPEG": b"first",
        "two.JPEG": b"",
    }


def test_rows_name_batch_split_class_and_place(tmp_path: Path, scene: Image.Image) -> None:
    data = encoded(scene)
    write_tar(group(one=data), tmp_path)
    (row,) = scan_tar(tmp_path / "train/week.1.tar", tmp_path, "mine")
    assert (row["key"], row["source_split"], row["class_name"]) == ("mine/train/week.1/one.JPEG", "train", "week.1")
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert read_at(tmp_path / row["tar"], row["offset"], row["bytes"]) == data


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"),
        ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("BMP", "RGB"),
    ],
)  # fmt: skip
def test_formats_are_known_by_content(scene: Image.Image, form: str, mode: str) -> None:
    facts = image_facts(encoded(scene.convert(mode), form))
    assert (facts["format"], facts["mode"], facts["decodes"], facts["error"]) == (form, mode, True, "")
    assert (facts["width"], facts["height"]) == (160, 120)
    assert facts["brightness"] == pytest.approx(np.asarray(scene.convert("L")).mean(), abs=4)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "BMP", "PNG"])
@pytest.mark.parametrize("kept", [0.3, 0.95, -20])
def test_every_truncation_is_found(scene: Image.Image, form: str, kept: float) -> None:
    data = encoded(scene, form)
    facts = image_facts(data[: int(len(data) * kept)] if kept > 0 else data[: int(kept)])
    assert not facts["decodes"], form
    assert facts["error"]


def test_what_is_no_image(scene: Image.Image) -> None:
    assert image_facts(b"")["error"] == "empty file"
    assert image_facts(b"just a note")["error"] == "not an image"
    # A postscript file would start another program in a careless reader.
    assert read_header(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").format == ""


def test_damage_that_pillow_does_not_expect_is_an_answer_too(scene: Image.Image) -> None:
    """Strips that begin at a fraction of a byte: a TypeError, of all things."""
    tiff = encoded(scene, "TIFF")
    damaged = tiff.replace(struct.pack("<HHI", 0x0111, 4, 1), struct.pack("<HHI", 0x0111, 11, 1))
    assert damaged != tiff
    facts = image_facts(damaged)
    assert (facts["format"], facts["decodes"]) == ("TIFF", False)
    assert facts["error"]


def test_a_bomb_is_not_decoded() -> None:
    small = encoded(Image.new("L", (8, 8)), "BMP")
    bomb = small[:18] + (60_000).to_bytes(4, "little") * 2 + small[26:]
    facts = image_facts(bomb)
    assert not facts["decodes"]
    assert str(MAX_PIXELS) in facts["error"]


def test_to_rgb_turns_and_keeps_sixteen_bits(scene: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(scene, exif=exif, quality=95)
    assert image_facts(turned)["orientation"] == 6
    assert to_rgb(turned).size == (120, 160)
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    assert np.array_equal(np.asarray(to_rgb(encoded(Image.fromarray(grey), "PNG")))[:, :, 0], grey >> 8)


# ---------------------------------------------------------------------------------------------------- parts of a batch


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: Image.Image) -> Path:
    """A folder of raw tars of all three kinds, one of them so large that it is scanned in parts."""
    monkeypatch.setattr(scanning, "LEAST_PART", 20_000)
    monkeypatch.setattr(scanning, "PARTS", 1000)
    folder = tmp_path / "raw"
    images = {f"{n:02d}.JPEG": encoded(scene.rotate(n), quality=60 + n) for n in range(30)}
    packed(folder / "train/n01.tar", dict(list(images.items())[:4]))
    packed(folder / "val-00000.tar", {f"n{int(name[0]):02d}/{name}": data for name, data in images.items()})
    packed(folder / "unlabelled/all-00000.tar", {"a.JPEG": b"", "ü" * 80: images["07.JPEG"]})
    return folder


def packed(path: Path, files: dict[str, bytes]) -> None:
    """A raw tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def scanned(folder: Path, work: Path, workers: int) -> list[TarPart]:
    """Scans what is not yet whole; all parts of the batch."""
    parts = tar_parts(raw_tars(folder), folder, workers)
    left = [part for part in parts if not part.file(work).is_file()]
    done = scan_parts(left, folder, "mine", work, workers)
    assert {part._replace(crashed=frozenset()) for part in done} == set(left)
    return parts


def facts_of(folder: Path, work: Path, workers: int = 2) -> bytes:
    """The file that scan writes."""
    out = work.with_suffix(".parquet")
    write_tables(read_parts(scanned(folder, work, workers), work), FACTS, out)
    return out.read_bytes()


def test_parts_in_any_number_of_processes_make_the_rows_of_the_tars(batch: Path, tmp_path: Path) -> None:
    alone, many = (facts_of(batch, tmp_path / str(workers), workers) for workers in (1, 3))
    assert alone == many
    parts = tar_parts(raw_tars(batch), batch, 2)
    assert [part.tar for part in parts].count("val-00000.tar") > 2
    expected = [row for tar in raw_tars(batch) for row in scan_tar(tar, batch, "mine")]
    found = pq.read_table(tmp_path / "1.parquet").to_pylist()
    assert [row["key"] for row in found] == [row["key"] for row in expected]
    assert len({row["key"] for row in found}) == 36
    assert found[0]["key"] == "mine/train/n01/00.JPEG"
    assert found[4]["key"] == "mine/all//a.JPEG"
    assert [(row["sha256"], row["hash"], row["error"]) for row in found] == [
        (row["sha256"], row["hash"], row["error"]) for row in expected
    ]


def test_whole_parts_are_not_scanned_again(batch: Path, tmp_path: Path) -> None:
    undisturbed = facts_of(batch, tmp_path / "first")
    work = tmp_path / "second"
    parts = scanned(batch, work, 2)
    written = {part: part.file(work).stat().st_mtime_ns for part in parts}
    lost = parts[1::2]
    for part in lost:
        part.file(work).unlink()
    assert facts_of(batch, work) == undisturbed
    assert {part for part in parts if part.file(work).stat().st_mtime_ns != written[part]} == set(lost)


def test_a_damaged_part_is_removed_and_named(batch: Path, tmp_path: Path) -> None:
    parts = scanned(batch, tmp_path / "work", 2)
    file = parts[2].file(tmp_path / "work")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StageError, match=f"was damaged .* run again to scan {parts[2].tar}"):
        list(read_parts(parts, tmp_path / "work"))
    assert not file.exists()


def test_an_image_that_crashes_the_decoder_is_named_and_the_rest_scanned(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {row["key"]: row for tar in raw_tars(batch) for row in scan_tar(tar, batch, "mine")}
    evil = {"mine/val/n00/05.JPEG", "mine/val/n02/21.JPEG"}
    decode = scanning.decode_strictly

    def crash(data: bytes, header: Header) -> np.ndarray:
        if hashlib.sha256(data).hexdigest() in {whole[key]["sha256"] for key in evil}:
            faulthandler.disable()  # pytest's, which would write a page
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(data, header)

    monkeypatch.setattr(scanning, "decode_strictly", crash)
    first, second = facts_of(batch, tmp_path / "one", 1), facts_of(batch, tmp_path / "three", 3)
    assert first == second
    for row in pq.read_table(tmp_path / "one.parquet").to_pylist():
        if row["key"] in evil:
            assert (row["decodes"], row["error"]) == (False, "the decoder crashed")
            assert row["sha256"] == whole[row["key"]]["sha256"]
        else:
            assert (row["decodes"], row["hash"]) == (whole[row["key"]]["decodes"], whole[row["key"]]["hash"])


def test_a_killed_process_is_told_with_the_tar_and_what_to_do(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "decode_strictly", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    message = r"train/n01\.tar, .* begin at 512, was killed by SIGKILL.*SYNSET_WORKERS to fewer than 1.*run again"
    with pytest.raises(StageError, match=message):
        facts_of(batch, tmp_path / "work", 1)


def test_a_damaged_tar_is_told(batch: Path, tmp_path: Path) -> None:
    path = batch / "val-00000.tar"
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(StageError, match=r"val-00000\.tar is damaged"):
        facts_of(batch, tmp_path / "work")


def test_of_a_huge_file_only_the_head_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: Image.Image
) -> None:
    monkeypatch.setattr(scanning, "MOST_BYTES", 50_000)
    monkeypatch.setattr(scanning, "HEAD_BYTES", 10_000)
    huge = encoded(scene) + bytes(60_001)
    packed(tmp_path / "train/n01.tar", {"huge.JPEG": huge, "next.JPEG": encoded(scene)})
    first, second = scan_tar(tmp_path / "train/n01.tar", tmp_path, "mine")
    assert (first["format"], first["width"], first["height"], first["bytes"]) == ("JPEG", 160, 120, len(huge))
    assert (first["decodes"], first["error"]) == (False, "larger than 50000 bytes")
    assert first["sha256"] == hashlib.sha256(huge).hexdigest()
    assert second["decodes"]


def test_row_groups_do_not_tell_how_rows_were_parted(tmp_path: Path) -> None:
    schema = pa.schema([("key", pa.string()), ("hash", pa.uint64())])
    count = 2 * ROW_GROUP + 7
    rows = pa.table({"key": [str(n % 1000) for n in range(count)], "hash": range(count)}, schema)
    bounds = [0, 1, 5, ROW_GROUP - 1, ROW_GROUP, ROW_GROUP + 3, 2 * ROW_GROUP, count]
    parted = [rows.slice(begin, end - begin) for begin, end in pairwise(bounds)]
    write_tables([rows], schema, tmp_path / "whole.parquet")
    write_tables(parted, schema, tmp_path / "parted.parquet")
    assert (tmp_path / "whole.parquet").read_bytes() == (tmp_path / "parted.parquet").read_bytes()
    with pq.ParquetFile(tmp_path / "whole.parquet") as file:
        groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert groups == [ROW_GROUP, ROW_GROUP, 7]
    write_tables([], schema, tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").equals(schema.empty_table())


def test_mutated_images_and_tars_are_answered(scene: Image.Image) -> None:
    """A few hundred; `python -m tests.data.fuzz_scanning` does as many as one likes."""
    pictures = [Image.open(io.BytesIO(file.data)).convert("RGB") for file in islice(draw("target", 1), 4)]
    assert fuzz(seeds_of(pictures), seed=3, first=0, count=600) == []
