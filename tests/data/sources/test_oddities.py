"""One sentence for each thing that looks odd in the classes and splits of a source, and none where nothing does."""

import pytest

from stages.data.sources.oddities import odd_classes, odd_counts, odd_files, odd_folders

ORDINARY = [
    "cat",
    "dog",
    "train_station",
    "test tube",
    "n01440764",
    "data_scientist",
    "crane (1)",
    "crane (2)",
    "C",
    "C++",
]


def test_ordinary_names_are_not_odd() -> None:
    assert list(odd_classes(ORDINARY)) == []


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["PetImages"], "one class only, PetImages"),
        (["Training", "Testing"], "look like splits: Training, Testing"),
        (["train2017", "VALIDATION"], "look like splits: train2017, VALIDATION"),
        (["images", "labels", "cat"], "folders of a data set: images, labels"),
        (["trainannot", "SegmentationClass", "Annotations"], "trainannot, SegmentationClass, Annotations"),
        (["__MACOSX", "cat"], "folders of a data set: __MACOSX"),
        (["cat", "None", "nan"], "missing label: None, nan"),
        (["cat", "[0, 1]", "{'id': 1}"], "look like JSON: [0, 1], {'id': 1}"),
        (["0", "1", "cat"], "some names of classes are numbers (0, 1) and others are not (cat)"),
        (["0.0", "1.0"], "numbers with a point: 0.0, 1.0"),
        (list("0123456789"), "counted by their value (0, 1, 2 and 7 more), and each is its class_id"),
        (["1", "2", "10"], "counted by their value (1, 2, 10), but class 1 has class_id 0"),
        (["0", "1", "7"], "but class 7 has class_id 2"),
        (["cat ", "dog"], "begin or end with a blank or a point: 'cat '"),
        (["cat.jpg", "dog.jpg"], "look like files: cat.jpg, dog.jpg"),
        (["Cat", "cat", "dog"], "differ only in case, blanks or signs: 'Cat' and 'cat'"),
        (["hot dog", "hot_dog", "Hot-Dog"], "'hot dog' and 'hot_dog' and 'Hot-Dog'"),
        (["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"], "differ only in"),
        (["cat", "cat - Copy", "dog"], "'cat' and 'cat - Copy'"),
    ],
)
def test_odd_names(names: list[str], sentence: str) -> None:
    found = list(odd_classes(names))
    assert any(sentence in each for each in found), found


def test_many_odd_names_are_one_short_sentence() -> None:
    found = list(odd_classes([f"{number}.5" for number in range(100_000)]))
    assert found == ["names of classes are numbers with a point: 0.5, 1.5, 2.5 and 99,997 more"]


def test_captions_in_place_of_classes() -> None:
    names = [f"a photo, number {number}" for number in range(20)]
    assert "every class has one image only" in list(odd_counts({"train": dict.fromkeys(names, 1)}, names))[-1]


def test_counts() -> None:
    names = ["a", "b", "c"]
    whole = {"train": dict.fromkeys(names, 50), "val": dict.fromkeys(names, 10)}
    assert list(odd_counts(whole, names)) == []
    assert list(odd_counts(whole | {"test": {"a": 9, "": 1}}, names)) == [
        "test: 1 of 10 images have no label (`?unlabelled=skip` leaves them out)",
        "test has no image of 2 of 3 classes: b, c",
    ]
    assert list(odd_counts({"test": {"": 20}, "train": dict.fromkeys(names, 50)}, names)) == [
        "test: 20 of 20 images have no label (`?unlabelled=skip` leaves them out)"
    ]
    assert "there is no train split (found: val, test)" in list(
        odd_counts({"val": {"a": 99}, "test": {"a": 99}}, ["a"])
    )
    small = {"all": {"a": 1, "b": 9, "c": 10}}
    assert list(odd_counts(small, names)) == ["2 of 3 classes have fewer than 10 images: a (1), b (9)"]
    assert list(odd_counts(small, names, few_asked=True)) == []
    assert list(odd_counts({"all": {"": 99}}, [])) == []


def test_class_folders_of_folders() -> None:
    assert list(odd_folders({"cat": ["video1"]}, 2)) == []
    (found,) = odd_folders({"b": ["x", "y"], "a": ["x", "y", "z", "w"]}, 2)
    assert found.startswith("2 of 2 class folders hold only folders, as a/ with x/, y/, z/ and 1 more")


def test_left_out() -> None:
    assert list(odd_files(5, 100, 5)) == []
    assert list(odd_files(20, 40, 30)) == [
        "20 of 60 files are left out",
        "30 of 40 files are no images by their names",
    ]
