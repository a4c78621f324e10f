"""Groups of a source: `?group=` of its query, and their way into the raw tars and out again."""

import json
import shutil
from pathlib import Path

import pytest

from stages.data.raw.tars import members, raw_tars
from stages.data.sources.account import Seen, account, as_text
from stages.data.sources.dispatch import read_source
from stages.data.sources.grouping import Grouping, group_field
from stages.data.sources.ingesting import ingest
from stages.data.sources.parts import Name
from stages.data.sources.preview import preview
from stages.data.sources.tar_writing import Tally, assemble, write_parts
from stages.data.sources.uri import SourceUri
from stages.params.batches import Batch
from stages.runtime import layout
from stages.runtime.command import StageError
from tests.closure import ROOT


def _group_of(query: str, name: str) -> str:
    return Grouping.of(SourceUri.parse(f"photos?{query}")).group_of(name, "told")


@pytest.mark.parametrize(
    ("text", "address", "group"),
    [
        (r"photos?group=(patient\d+)_", "photos", r"(patient\d+)_"),
        (r"photos?group=^(.*?)_?\d+&seed=1", "photos", r"^(.*?)_?\d+"),
        (r"photos?seed=1&group=(?:a|b)(\d+)x?", "photos", r"(?:a|b)(\d+)x?"),
        (r"https://host/x.parquet?sig=a+b?group=column:patient", "https://host/x.parquet?sig=a+b", "column:patient"),
        (r"photos?group=(a%26b)_%3F", "photos", "(a&b)_?"),
        (r"photos?group=(a b)", "photos", "(a b)"),
    ],
)
def test_a_regular_expression_survives_the_query(text: str, address: str, group: str) -> None:
    uri = SourceUri.parse(text)
    assert (uri.address, uri.query["group"]) == (address, group)


def test_a_url_with_a_query_of_its_own_ends_in_a_question_mark_as_before() -> None:
    uri = SourceUri.parse("https://host/x.parquet?download=true?")
    assert (uri.address, uri.query) == ("https://host/x.parquet?download=true", {})
    assert SourceUri.parse("photos?classes=a+b").query == {"classes": "a b"}


@pytest.mark.parametrize(
    ("query", "name", "group"),
    [
        (r"group=(patient\d+)_", "scans/patient12_3.png", "patient12"),
        (r"group=(patient\d+)_", "odd.png", ""),
        (r"group=(patient\d+)?_", "_3.png", ""),  # the brackets took no part
        ("group=folder:1", "video_7/000.png", "video_7"),
        ("group=folder:2", "site/video_7/000.png", "site/video_7"),
        ("group=folder:2", "video_7/000.png", ""),
        ("group=column:patient", "0-a.png", "told"),
    ],
)
def test_the_group_of_a_name(query: str, name: str, group: str) -> None:
    assert _group_of(query, name) == group


@pytest.mark.parametrize("text", ["patient", "(a)(b)", "(a", "folder:0", "folder:x", "[", "column"])
def test_what_is_no_grouping_says_what_one_is(text: str) -> None:
    with pytest.raises(StageError, match=r"group=.*one pair of brackets around") as error:
        Grouping.of(SourceUri.parse(f"photos?group={text}"))
    assert "folder:N" in str(error.value)


def test_a_column_is_of_parquet_and_a_field_of_webdataset() -> None:
    uri = SourceUri.parse("x.parquet?group=column:patient")
    assert group_field(uri, "column") == "patient"
    for query in ("group=field:patient", "group=column:"):
        with pytest.raises(StageError, match="does not fit"):
            group_field(SourceUri.parse(f"x.parquet?{query}"), "column")
    assert group_field(SourceUri.parse("x?group=(a)"), "column") is None


@pytest.mark.parametrize("group", ["x" * 201, "a\nb"])
def test_a_group_that_cannot_be_shown_is_refused(group: str) -> None:
    with pytest.raises(StageError, match="cannot name a group"):
        Grouping("column:x").group_of("a.png", group)


NAMES = ("a/p1_1.png", "a/p1_2.png", "a/p2_1.png", "b/p1_3.png", "b/odd.png", "b/pé_1.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "photos"


def _written(source: str, folder: Path) -> dict[str, str]:
    """Writes raw tars; the group of each file that they hold."""
    read = read_source(source, folder)
    made = dict(write_parts(read, folder / "work", 1, Tally()))
    assemble([made[part] for part in sorted(made)], folder / "work", folder / "raw")
    return {each.path: each.group for tar in raw_tars(folder / "raw") for each in members(tar, folder / "raw")}


@pytest.mark.parametrize("more", ["", "&unlabelled=true"])
def test_groups_are_in_the_raw_tars(photos: Path, more: str) -> None:
    groups = _written(rf"{photos}?group=(p[\dé]+)_{more}", photos.parent)
    assert {path.rpartition("/")[2]: group for path, group in groups.items()} == {
        "p1_1.png": "p1", "p1_2.png": "p1", "p2_1.png": "p2", "p1_3.png": "p1", "odd.png": "", "pé_1.png": "pé"
    }  # fmt: skip


def test_a_class_folder_that_is_no_label_can_be_the_group(photos: Path) -> None:
    assert set(_written(f"{photos}?unlabelled=true&group=folder:1", photos.parent).values()) == {"a", "b"}


def test_without_groups_raw_tars_have_the_bytes_that_they_had(photos: Path, tmp_path: Path) -> None:
    for place, query in (("plain", ""), ("none", "?group=(never)")):
        (tmp_path / place).mkdir()
        assert set(_written(f"{photos}{query}", tmp_path / place).values()) == {""}
    plain, none = ([tar.read_bytes() for tar in raw_tars(tmp_path / place / "raw")] for place in ("plain", "none"))
    assert plain == none


def test_another_grouping_is_other_work(photos: Path) -> None:
    listings = {read_source(f"{photos}{query}", photos).listing for query in ("", "?group=(a)", "?group=folder:1")}
    assert len(listings) == 3


def test_the_account_counts_groups_and_images_in_none(photos: Path) -> None:
    source, seen = read_source(rf"{photos}?group=(p[\dé]+)_", photos), Seen()
    for part in source.parts:
        for name in part.names():
            assert isinstance(name, Name)
            seen.see(name, taken=True)
            seen.see_group(name.name, source.group_of(name))
    text = as_text(account(source, seen))
    assert "3, with 5 images" in text and "the largest, p1, has 3" in text
    assert "1 × image in no group; it is its own (odd.png)" in text


def test_a_grouping_that_groups_nothing_is_odd_or_refused(photos: Path) -> None:
    with pytest.raises(StageError, match="a column is of a Parquet source"):
        read_source(f"{photos}?group=column:patient", photos)
    with pytest.raises(StageError, match="puts no image into a group"):
        preview(f"{photos}?group=(zzz)", photos)
    assert "every group has one" in preview(rf"{photos}?group=(\w+)\.png&classes=a", photos)


def test_ingest_stops_where_no_image_is_in_a_group(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"{photos}?group=(zzz)"
    (tmp_path / "params.yaml").write_text(json.dumps({"batches": {"new": {"role": "finetune", "source": source}}}))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=r"puts no image into a group \(the first is p1_1.png"):
        ingest("new", Batch(role="finetune", source=source))
    assert not layout.raw("finetune", "new").exists()
