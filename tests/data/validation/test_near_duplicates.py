"""Exact and near-duplicates: found without comparing all pairs, confirmed on pixels, and decided from the top down."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from stages.data.raw.images import decode_strictly, difference_hash, read_header
from stages.data.validation import hamming_pairs, near_duplicates, pixel_match
from stages.data.validation.near_duplicates import find_duplicates, look_alikes, near_pairs
from stages.data.validation.pixel_match import pixel_confirmation, same_thumbnails, thumbnails
from stages.params.validate import Validate
from stages.runtime.command import StageError


def _never(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.zeros(len(left), dtype=bool)


def _always(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.ones(len(left), dtype=bool)


def _looks(hashes: list[int] | np.ndarray, brightness: float = 100.0, contrast: float = 40.0) -> pd.DataFrame:
    return pd.DataFrame({"hash": np.array(hashes, np.uint64), "brightness": brightness, "contrast": contrast})


UNLABELLED: dict[str, Any] = {"arrival": 0, "role": "pretrain", "class_name": ""}


def _rows(hashes: list[int], contents: list[str] | None = None) -> pd.DataFrame:
    return _looks(hashes).assign(sha256=contents or [str(number) for number in range(len(hashes))], **UNLABELLED)


def _clustered(count: int, seed: int) -> pd.DataFrame:
    """Random hashes, most of them a few flipped bits away from another; some plain or just not, some shared by many."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, count // 30, dtype=np.uint64)
    centres[:12] = [0, 2**64 - 1, 0x0101, *(0b11111111 << 6 * number for number in range(9))]
    hashes = rng.choice(centres, count)
    for _ in range(4):
        flipped = rng.random(count) < 0.5
        hashes = np.where(flipped, hashes ^ (np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)), hashes)
    hashes[: count // 20] = 0
    brightness, contrast = rng.uniform(60, 120, count), rng.uniform(20, 60, count)
    return pd.DataFrame({"hash": hashes, "brightness": brightness, "contrast": contrast, **UNLABELLED})


def _brute_force(looks: pd.DataFrame, distance: int, difference: float) -> set[tuple[int, int]]:
    """The definition of `near_pairs`, all pairs compared."""
    hashes = looks["hash"].to_numpy()
    plain = near_duplicates.is_plain(hashes)
    both_plain = plain[:, None] & plain[None, :]
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= distance
    for fact, plain_tolerance in (("brightness", 6.0), ("contrast", 2.0)):
        values = looks[fact].to_numpy()
        near &= np.abs(values[:, None] - values[None, :]) <= np.where(both_plain, plain_tolerance, difference + 2.0)
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)}


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 8])
def test_near_pairs_are_those_that_comparing_all_pairs_finds(distance: int) -> None:
    looks = _clustered(1500, seed=distance)
    expected = _brute_force(looks, distance, 12.0)
    assert len(expected) > 10
    upper, lower = near_pairs(looks, distance, 12.0)
    assert list(zip(upper.tolist(), lower.tolist(), strict=True)) == sorted(expected)


@pytest.mark.parametrize("equal", [1, 2, 3, 4])
def test_every_number_of_equal_substrings_finds_the_same_pairs(equal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = _clustered(800, seed=9)
    monkeypatch.setattr(hamming_pairs, "_equal_substrings", lambda count, distance: equal)
    monkeypatch.setattr(near_duplicates, "CHUNK", 100)
    upper, lower = near_pairs(looks, 6, 12.0)
    assert set(zip(upper.tolist(), lower.tolist(), strict=True)) == _brute_force(looks, 6, 12.0)


def test_a_crowd_with_one_plain_hash_does_not_explode() -> None:
    rng = np.random.default_rng(1)
    crowd = _looks(np.zeros(30_000))
    crowd["brightness"], crowd["contrast"] = rng.uniform(0, 255, 30_000), rng.uniform(1, 80, 30_000)
    upper, _ = near_pairs(crowd, 6, 12.0)
    assert len(upper) < 30_000**2 / 2 / 200


def test_hashes_that_tell_nothing_apart_stop_with_the_parameter_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 1000)
    with pytest.raises(StageError, match="near_duplicate_distance below 6"):
        near_pairs(_looks([0xF0F0F0F0F0F0F0F0] * 100), 6, 12.0)


def test_a_search_that_would_take_hours_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming_pairs, "MAX_CANDIDATES", 100)
    with pytest.raises(StageError, match="near_duplicate_distance below 6"):
        near_pairs(_clustered(800, seed=9), 6, 12.0)


def test_no_images_have_no_pairs() -> None:
    upper, lower = near_pairs(_looks([]), 6, 12.0)
    assert len(upper) == len(lower) == 0


def test_same_bytes_yield_to_the_first_without_a_look_at_pixels() -> None:
    found = find_duplicates(_rows([1, 1, 9, 1], ["a", "a", "b", "a"]), Validate(), _never)
    assert found.yields_to.tolist() == [-1, 0, -1, 0]
    assert found.exact.tolist() == [False, True, False, True]


def test_a_hash_match_that_pixels_refuse_is_no_duplicate() -> None:
    rows = _rows([0x1234567812345678, 0x1234567812345678])
    assert find_duplicates(rows, Validate(), _never).yields_to.tolist() == [-1, -1]
    assert find_duplicates(rows, Validate(), _always).yields_to.tolist() == [-1, 0]


def test_images_yield_only_to_images_that_stay() -> None:
    # b is like a, c like b but not like a: b yields to a, and c has nobody to yield to. b's copy is like a, as b is.
    a = 0x0F0F0F0F0F0F0F0F
    b, c = a ^ 0b1111, a ^ 0b11111111
    found = find_duplicates(_rows([a, b, c, b], ["a", "b", "c", "b"]), Validate(near_duplicate_distance=4), _always)
    assert found.yields_to.tolist() == [-1, 0, -1, 0]
    assert found.exact.tolist() == [False] * 4
    assert sorted(map(tuple, found.same.tolist())) == [(0, 1), (1, 2), (1, 3)]


def test_null_distance_looks_for_exact_duplicates_only() -> None:
    limits = Validate(near_duplicate_distance=None)
    found = find_duplicates(_rows([7, 7, 7], ["a", "b", "a"]), limits, _always)
    assert found.yields_to.tolist() == [-1, -1, 0]


def test_what_comes_below_never_changes_what_is_above() -> None:
    rows = _clustered(600, seed=5)
    rows["sha256"] = np.random.default_rng(5).integers(0, 500, 600).astype(str)
    whole = find_duplicates(rows, Validate(), _always)
    assert (whole.yields_to >= 0).sum() > 50
    for count in (1, 100, 350, 599):
        part = find_duplicates(rows.iloc[:count], Validate(), _always)
        assert part.yields_to.tolist() == whole.yields_to[:count].tolist()
        assert part.exact.tolist() == whole.exact[:count].tolist()


def test_look_alikes_share_a_hash_or_are_the_same_picture_within_a_class_of_a_batch() -> None:
    rows = _rows([1, 2, 2, 3, 4, 2, 2, 9, 8]).assign(arrival=[0] * 6 + [1] * 3, class_name=list("aaaaababb"))
    # 3 is 0; 4 is 1, and so it is 2, which has the hash of 1; 7 and 8 are 0, of another batch, and so each other.
    look = look_alikes(rows, np.array([[0, 3], [1, 4], [0, 7], [0, 8]]))
    pairs = {(i, j) for i in range(9) for j in range(i) if look[i] == look[j]}
    assert pairs == {(2, 1), (4, 1), (4, 2), (3, 0), (8, 7)}
    assert look_alikes(rows.iloc[:0], np.empty((0, 2), np.int64)).tolist() == []


def test_a_later_batch_never_joins_what_was_apart_in_an_earlier_one() -> None:
    rows = _rows([1, 2, 3, 4]).assign(arrival=[0, 0, 1, 1], class_name="a")
    look = look_alikes(rows, np.array([[0, 2], [1, 2], [1, 3]]))
    assert look[0] != look[1] and look[2] == look[3]


# ------------------------------------------------------------------------------------------------ on pixels


def _picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def _jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _archive(folder: Path, images: list[bytes]) -> pd.DataFrame:
    """Images in one raw tar, and their rows of facts."""
    rows = []
    (folder / "all").mkdir(parents=True)
    with tarfile.open(folder / "all/c.tar", "w") as tar:
        for number, data in enumerate(images):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(folder / "all/c.tar") as tar:
        for member, data in zip(tar.getmembers(), images, strict=True):
            luminance = decode_strictly(data, read_header(data))
            rows.append(
                {
                    "sha256": member.name,
                    "tar": "all/c.tar",
                    "offset": member.offset_data,
                    "bytes": member.size,
                    "hash": difference_hash(luminance),
                    "brightness": luminance.mean(),
                    "contrast": luminance.std(),
                    "width": read_header(data).width,
                    "height": read_header(data).height,
                }
            )
    return pd.DataFrame(rows).astype({"hash": np.uint64}).assign(**UNLABELLED)


def test_recoded_resized_and_brightened_copies_are_found_and_other_pictures_are_not(tmp_path: Path) -> None:
    original = _picture(1)
    copies = [
        _jpeg(original, quality=40),
        _jpeg(original.resize((80, 60))),
        _jpeg(original.resize((200, 120))),
        _jpeg(original.point(lambda value: min(255, value + 6))),
    ]
    others = [_jpeg(_picture(seed)) for seed in range(2, 8)]
    rows = _archive(tmp_path / "b", [_jpeg(original), *copies, *others])
    confirm = pixel_confirmation(rows, [tmp_path / "b"] * len(rows), Validate())
    found = find_duplicates(rows, Validate(), confirm)
    assert found.yields_to.tolist() == [-1, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1]


def test_a_darker_copy_of_a_picture_with_a_plain_hash_is_found(tmp_path: Path) -> None:
    shade = np.tile(np.linspace(200, 60, 120), (90, 1))
    shade[30:50, 40:60] += 40
    original = Image.fromarray(shade.astype(np.uint8)).convert("RGB")
    darker = original.point(lambda value: max(0, value - 4))
    rows = _archive(tmp_path / "b", [_jpeg(original), _jpeg(darker, quality=70)])
    assert near_duplicates.is_plain(rows["hash"].to_numpy()).all()
    confirm = pixel_confirmation(rows, [tmp_path / "b"] * 2, Validate())
    assert find_duplicates(rows, Validate(), confirm).yields_to.tolist() == [-1, 0]


def test_pixels_refuse_a_collision_of_hashes(tmp_path: Path) -> None:
    rows = _archive(tmp_path / "b", [_jpeg(_picture(1)), _jpeg(_picture(2))])
    rows[["hash", "brightness", "contrast"]] = list(rows.loc[0, ["hash", "brightness", "contrast"]])
    rows["hash"] = np.array([0x1234567812345678] * 2, np.uint64)
    rows["sha256"] = ["a", "b"]
    confirm = pixel_confirmation(rows, [tmp_path / "b"] * 2, Validate())
    assert find_duplicates(rows, Validate(), _always).yields_to.tolist() == [-1, 0]
    assert find_duplicates(rows, Validate(), confirm).yields_to.tolist() == [-1, -1]


def test_thumbnails_must_agree_in_level_and_in_structure() -> None:
    ramp = np.tile(np.arange(0, 128, 4, dtype=np.uint8), 32)
    pictures = np.stack([ramp, ramp + 5, ramp + 60, ramp[::-1] + 0, np.full(1024, 62, np.uint8)])
    against = np.arange(5)
    assert same_thumbnails(pictures, np.zeros(5, int), against, Validate()).tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_same_thumbnails_is_what_numpy_says_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_match, "PAIRS_AT_ONCE", 7)
    rng = np.random.default_rng(4)
    first = rng.integers(0, 256, (40, 1024))
    pictures = np.clip(np.concatenate([first, first + rng.normal(0, 18, first.shape)]), 0, 255).astype(np.uint8)
    left, right = np.arange(40), np.arange(40, 80)
    limits = Validate(near_duplicate_difference=14.0, near_duplicate_correlation=0.97)
    expected = [
        np.abs(one - other).mean() <= 14.0 and np.corrcoef(one, other)[0, 1] >= 0.97
        for one, other in zip(pictures[:40].astype(float), pictures[40:].astype(float), strict=True)
    ]
    assert 0 < sum(expected) < 40
    assert same_thumbnails(pictures, left, right, limits).tolist() == expected


@pytest.mark.parametrize("workers", ["1", "3"])
def test_thumbnails_are_in_the_order_of_the_rows_whatever_the_tars(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNSET_WORKERS", workers)
    monkeypatch.setattr(pixel_match, "IMAGES_A_TASK", 2)
    folders = [tmp_path / "one", tmp_path / "two"]
    parts = [_archive(folder, [_jpeg(_picture(10 * n + k)) for k in range(5)]) for n, folder in enumerate(folders)]
    rows = pd.concat(parts, ignore_index=True)
    raw = [folders[0]] * 5 + [folders[1]] * 5
    order = np.random.default_rng(1).permutation(10)
    shuffled = thumbnails(rows.iloc[order], [raw[position] for position in order])
    assert np.array_equal(shuffled, thumbnails(rows, raw)[order])
    assert len(np.unique(shuffled, axis=0)) == 10


def test_a_missing_raw_tar_says_how_to_get_it_back(tmp_path: Path) -> None:
    rows = _archive(tmp_path / "raw/b", [_jpeg(_picture(1)), _jpeg(_picture(1), quality=50)])
    (tmp_path / "raw/b/all/c.tar").unlink()
    confirm = pixel_confirmation(rows, [tmp_path / "raw/b"] * 2, Validate())
    with pytest.raises(StageError, match="dvc pull"):
        find_duplicates(rows, Validate(), confirm)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many thumbnails are made, call by call."""
    made: list[int] = []

    def counting(rows: pd.DataFrame, raw: list[Path]) -> np.ndarray:
        made.append(len(rows))
        return thumbnails(rows, raw)

    monkeypatch.setattr(pixel_match, "thumbnails", counting)
    return made


def test_thumbnails_made_once_are_kept_and_those_no_longer_asked_for_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _archive(tmp_path / "b", [_jpeg(_picture(seed)) for seed in range(6)])
    made, kept, raw = _counted(monkeypatch), tmp_path / "work/kept.npz", [tmp_path / "b"] * 6
    one, other = np.array([0, 0, 1]), np.array([1, 2, 3])
    expected = pixel_confirmation(rows, raw, Validate())(one, other)
    made.clear()
    assert np.array_equal(pixel_confirmation(rows, raw, Validate(), kept)(one, other), expected)
    assert np.array_equal(pixel_confirmation(rows, raw, Validate(), kept)(one, other), expected)
    # A fresh batch stands below: other positions, and images of its own.
    later = pd.concat([rows.iloc[[4]], rows.iloc[:4]], ignore_index=True)
    pixel_confirmation(later, raw[:5], Validate(), kept)(np.array([0, 1]), np.array([1, 2]))
    assert made == [4, 0, 1]
    with np.load(kept) as arrays:
        assert arrays["sha256"].astype(str).tolist() == sorted(rows["sha256"].iloc[[0, 1, 4]])
        pictures = dict(zip(arrays["sha256"].astype(str), arrays["pixels"], strict=True))
    for sha256, picture in zip(rows["sha256"].iloc[[0, 1, 4]], thumbnails(rows.iloc[[0, 1, 4]], raw[:3]), strict=True):
        assert np.array_equal(pictures[sha256], picture)


@pytest.mark.parametrize("cut", [0, 100, -30])
def test_damaged_kept_thumbnails_are_made_anew(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = _archive(tmp_path / "b", [_jpeg(_picture(seed)) for seed in range(2)])
    kept, raw = tmp_path / "kept.npz", [tmp_path / "b"] * 2
    confirm = pixel_confirmation(rows, raw, Validate(), kept)
    confirm(np.array([0]), np.array([1]))
    whole = kept.read_bytes()
    kept.write_bytes(whole[:cut])
    made = _counted(monkeypatch)
    confirm(np.array([0]), np.array([1]))
    assert made == [2]
    assert "damaged" in caplog.text
    assert kept.read_bytes() == whole
