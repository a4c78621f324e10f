"""Facts: raw tars are deterministic, and scan says of each file what it is."""

import hashlib
import io
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.images import MAX_PIXELS, read_header, to_rgb
from stages.data.ingesting import write_tar
from stages.data.raw import members, read_at
from stages.data.scanning import image_facts, scan_tar
from stages.data.sources import Group, SourceFile


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
