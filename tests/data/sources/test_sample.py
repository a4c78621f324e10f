"""The built-in sample: the same files for the same seed, and dirt that is what it is called."""

import io
import itertools

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.data.sources.sample import (
    ACCEPTED_KINDS,
    BAD_KINDS,
    CAMERAS,
    CLASSES,
    COUNTS,
    SAMPLES,
    _jpeg_file,
    draw,
    draw_object,
    planted,
)

SEEDS = (1, 7)


@pytest.fixture(scope="module", params=itertools.product(SAMPLES, SEEDS), ids=lambda each: f"{each[0]}-{each[1]}")
def drawn(request: pytest.FixtureRequest) -> tuple[dict[str, bytes], dict[str, str]]:
    """A quarter of a sample, large enough to hold every kind of dirt: path → bytes, path → planted kind."""
    name, seed = request.param
    per_class = sum(COUNTS[name].values()) // 4
    return dict(draw(name, seed, per_class)), planted(name, seed, per_class)


def open_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def decode_strictly(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, strict=True)


def luminance(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data).convert("L").resize((32, 32), Image.Resampling.BOX), dtype=float)


def of_kind(drawn: tuple[dict[str, bytes], dict[str, str]], kind: str) -> dict[str, bytes]:
    files, kinds = drawn
    return {path: files[path] for path in kinds if kinds[path] == kind}


@pytest.mark.parametrize("name", SAMPLES)
def test_same_seed_same_bytes_other_seed_other_bytes(name: str) -> None:
    first, again, other = (list(draw(name, seed, 8)) for seed in (3, 3, 4))
    assert first == again
    assert not {file.data for file in first if file.data} & {file.data for file in other if file.path[-5:] == ".JPEG"}


def test_a_seed_means_other_pictures_in_each_sample() -> None:
    pictures = [file.data for name in SAMPLES for file in draw(name, 3, 6)]
    assert len(set(pictures)) > 0.9 * len(pictures)


def test_upstream_and_target_share_factors_but_no_class() -> None:
    upstream, target = (set(CLASSES[name]) for name in SAMPLES)
    assert (len(upstream), len(target)) == (12, 6)
    assert not upstream & target
    for position in range(3):  # shape, colour, texture
        upstream_words, target_words = (
            [each.split("_")[position] for each in classes] for classes in (upstream, target)
        )
        assert set(target_words) <= set(upstream_words)
        assert len(set(target_words)) < len(target_words), "one factor alone would tell the target classes"


def test_planned_counts() -> None:
    assert sum(COUNTS["upstream"].values()) == 200
    assert COUNTS["target"]["train"] in range(40, 46)
    assert COUNTS["target"]["test"] >= 100


def test_each_split_keeps_its_share(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    pictures = [path.split("/")[:2] for path in drawn[0] if path.endswith(".JPEG")]
    name = next(name for name in SAMPLES if pictures[0][1] in CLASSES[name])
    for split, count in COUNTS[name].items():
        for class_name in CLASSES[name]:
            assert pictures.count([split, class_name]) == round(count / 4)


def test_sorted_by_path_without_repeats(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    paths = list(drawn[0])
    assert paths == sorted(set(paths))


def test_every_kind_is_planted_and_few_files_are_bad(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    files, kinds = drawn
    assert set(kinds.values()) == BAD_KINDS | ACCEPTED_KINDS
    assert sum(kind in BAD_KINDS for kind in kinds.values()) < 0.05 * len(files)
    assert kinds.keys() <= files.keys()


@pytest.mark.parametrize("images_per_class", [1, 4, 15])
def test_small_samples_hold_what_fits(images_per_class: int) -> None:
    for name in SAMPLES:
        files, kinds = dict(draw(name, 1, images_per_class)), planted(name, 1, images_per_class)
        bad = [path for path, kind in kinds.items() if kind in BAD_KINDS]
        assert len(bad) < 0.05 * len(files) + 1
        assert kinds.keys() <= files.keys()


def test_all_that_was_not_planted_is_a_whole_rgb_jpeg(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    files, kinds = drawn
    clean = [data for path, data in files.items() if path not in kinds]
    for data in clean:
        assert decode_strictly(data).shape[2] == 3
        with open_image(data) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 72 <= min(image.size) <= max(image.size) <= 160
    assert len(set(clean)) == len(clean)


def test_size_and_aspect_and_quality_vary(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    files, kinds = drawn
    images = [open_image(data) for path, data in files.items() if path not in kinds]
    assert len({image.size for image in images}) > 0.8 * len(images)
    aspects = [image.width / image.height for image in images]
    assert min(aspects) < 0.8
    assert max(aspects) > 1.25
    assert len({tuple(image.quantization[0]) for image in images}) > 20  # type: ignore[attr-defined]


def test_the_object_is_told_by_shape_colour_and_texture() -> None:
    def picture(class_name: str) -> np.ndarray:
        return np.asarray(draw_object(class_name, np.random.default_rng(5), CAMERAS["target"]), dtype=float)

    red = picture("mug_red_striped")
    for other in ("fish_red_striped", "mug_blue_striped", "mug_red_dotted"):
        assert np.abs(red - picture(other)).max() > 50


def test_truncated_zero_byte_and_text_do_not_decode(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    truncated = of_kind(drawn, "truncated").values()
    assert len({len(data) for data in truncated}) == len(truncated) >= 2
    for data in truncated:
        with open_image(data) as image:
            assert image.format == "JPEG"
        with pytest.raises(ValueError, match=r"[Pp]remature end"):
            decode_strictly(data)
    assert set(of_kind(drawn, "zero_byte").values()) == {b""}
    for path, data in of_kind(drawn, "text").items():
        assert path.endswith(".txt")
        assert data.decode().isprintable() or data.endswith(b"\n")
        with pytest.raises(UnidentifiedImageError):
            open_image(data)


@pytest.mark.parametrize(
    ("kind", "form", "mode"),
    [
        ("png", "PNG", "RGB"),
        ("webp", "WEBP", "RGB"),
        ("cmyk", "JPEG", "CMYK"),
        ("grey", "JPEG", "L"),
        ("sixteen_bit", "PNG", "I;16"),
        ("exif", "JPEG", "RGB"),
        ("one_pixel", "JPEG", "RGB"),
    ],
)
def test_odd_images_are_what_they_are_called(
    drawn: tuple[dict[str, bytes], dict[str, str]], kind: str, form: str, mode: str
) -> None:
    for path, data in of_kind(drawn, kind).items():
        with open_image(data) as image:
            image.load()
            assert path.endswith(".JPEG")
            assert (image.format, image.mode) == (form, mode)
            assert image.getexif().get(0x0112, 1) == (6 if kind == "exif" else 1)
            assert (image.size == (1, 1)) == (kind == "one_pixel")
            if kind == "sixteen_bit":
                assert np.asarray(image).max() > 255


def test_duplicates_repeat_a_file_that_goes_before_them(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    files, kinds = drawn
    precedence = {"test": 0, "val": 1, "train": 2}
    kept = {data: path for path, data in files.items() if path not in kinds}
    across = 0
    for path, data in of_kind(drawn, "duplicate").items():
        original = kept[data]
        split, original_split = path.split("/")[0], original.split("/")[0]
        assert (precedence[original_split], original) < (precedence[split], path)
        assert original.split("/")[1] == path.split("/")[1]
        across += split != original_split
    assert 0 < across < len(of_kind(drawn, "duplicate"))


def test_near_duplicates_in_train_resemble_a_tested_image(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    files, kinds = drawn
    tested = "test" if any(path.startswith("test/") for path in files) else "val"
    for path, data in of_kind(drawn, "near_duplicate").items():
        split, class_name, _ = path.split("/")
        same_class = [each for each in files if each.startswith(f"{tested}/{class_name}/") and each not in kinds]
        far = sorted((np.abs(luminance(files[each]) - luminance(data)).mean(), each) for each in same_class)
        assert split == "train"
        assert far[0][0] < 6 < 12 < far[1][0]
        assert files[far[0][1]] != data


def test_drawn_pictures_are_not_alike(drawn: tuple[dict[str, bytes], dict[str, str]]) -> None:
    files, kinds = drawn
    looks = np.stack([luminance(data).ravel() for path, data in files.items() if path not in kinds])
    squares = np.square(looks).sum(axis=1)
    distances = squares[:, None] + squares - 2 * looks @ looks.T
    np.fill_diagonal(distances, np.inf)
    assert np.sqrt(distances.min() / looks.shape[1]) > 10  # root mean square, in levels of luminance


def test_exif_image_is_upright_when_turned() -> None:
    files, kinds = dict(draw("target", 1, 40)), planted("target", 1, 40)
    path = next(path for path in kinds if kinds[path] == "exif")
    with open_image(files[path]) as stored, open_image(_jpeg_file(path, "target", 1)) as upright:
        shown = ImageOps.exif_transpose(stored)
        assert shown.size == upright.size
        assert np.abs(np.asarray(shown, dtype=float) - np.asarray(upright, dtype=float)).mean() < 10


def test_unknown_sample() -> None:
    with pytest.raises(ValueError, match="no built-in sample 'sideways'; there are upstream, target"):
        list(draw("sideways", 1))
