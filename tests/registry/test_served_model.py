"""The served model: it sees what the evaluation sees, stands alone, and refuses what is no image."""

import ast
import base64
import inspect
import io
import json
import os
import re
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModelContext
from PIL import Image, ImageOps
from safetensors.torch import load_file

from stages.data.raw import images
from stages.data.raw.images import resize_shorter, to_rgb, upright_pixels
from stages.registry import served_model
from stages.registry.served_model import ImageClassifier, read_pixels
from stages.training.networks.models import build, load_classifier, save_classifier

SERVING = Path(__file__).parents[2] / "stages/registry/served_model.py"
CLASSES = ["bell", "cup", "tent", "sail"]


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def colours(width: int, height: int) -> Image.Image:
    cells = np.random.default_rng(width).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def sixteen_bit(**options: Any) -> bytes:
    grey = np.linspace(0, 65535, 90 * 80).reshape(80, 90).astype(np.uint16)
    return encoded(Image.fromarray(grey), "PNG", **options)


def odd_exif() -> bytes:
    """Orientation 6, and a width that is a text: Pillow reads both, and cannot write the latter back."""
    tags = struct.pack(">HHII", 0x0100, 2, 4, 0x61626300) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + bytes(4)


def half_transparent() -> Image.Image:
    image = colours(90, 80).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


FILES = {
    "JPEG": encoded(colours(101, 80), "JPEG"),
    "tall JPEG": encoded(colours(75, 300), "JPEG"),
    "CMYK": encoded(colours(90, 80).convert("CMYK"), "JPEG"),
    "grey": encoded(colours(90, 80).convert("L"), "JPEG"),
    "turned": encoded(colours(100, 80), "JPEG", exif=orientation(6)),
    "turned, with an odd tag": encoded(colours(100, 80), "JPEG", exif=odd_exif()),
    "turned TIFF": encoded(colours(100, 80), "TIFF", tiffinfo={0x0112: 6}),
    "16 bits": sixteen_bit(),
    "16 bits, turned": sixteen_bit(exif=orientation(6)),
    "palette": encoded(colours(90, 80).convert("P"), "PNG"),
    "transparent": encoded(colours(90, 80).convert("RGBA"), "PNG"),
    "half transparent": encoded(half_transparent(), "PNG"),
    "half transparent WebP": encoded(half_transparent(), "WEBP", lossless=True),
    "grey, half transparent": encoded(half_transparent().convert("LA"), "PNG"),
    "transparent palette": encoded(colours(90, 80).convert("P"), "PNG", transparency=3),
    "transparent GIF": encoded(half_transparent(), "GIF"),
    "LAB": encoded(Image.merge("LAB", colours(90, 80).split()), "TIFF"),
    "WebP": encoded(colours(90, 80), "WEBP"),
    "BMP": encoded(colours(90, 80), "BMP"),
    "as stored": encoded(colours(72, 97), "JPEG"),
}


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_those_of_sharding(kind: str) -> None:
    """Upright and converted alike, to the last bit; resized by another library, to a level or so."""
    upright, _ = upright_pixels(FILES[kind])
    np.testing.assert_array_equal(upright, np.asarray(to_rgb(FILES[kind])))
    expected = resize_shorter(upright, 72)
    served = read_pixels(FILES[kind], 72, 64)
    assert served.shape == (64, 64, 3)
    top, left = ((length - 64 + 1) // 2 for length in expected.shape[:2])
    difference = np.abs(served.astype(int) - expected[top : top + 64, left : left + 64])
    assert difference.mean() < 1
    assert min(upright.shape[:2]) > 72 or not difference.any()


@pytest.mark.parametrize("kind", ["turned", "turned, with an odd tag"])
def test_an_orientation_is_applied_whatever_the_other_tags_are(kind: str) -> None:
    as_stored = np.asarray(to_rgb(encoded(colours(100, 80), "JPEG")))
    np.testing.assert_array_equal(np.asarray(to_rgb(FILES[kind])), np.rot90(as_stored, -1))


@pytest.mark.parametrize("number", range(1, 10))
def test_every_orientation_is_turned_as_pillow_does_it(number: int) -> None:
    turned = encoded(colours(100, 80), "PNG", exif=orientation(number))
    with Image.open(io.BytesIO(turned)) as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(turned)), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("name", ["_upright", "_eight_bit", "_refuse_few_bits", "_significant_bits", "_on_background"])
def test_what_is_repeated_is_the_same_line_by_line(name: str) -> None:
    assert inspect.getsource(getattr(served_model, name)) == inspect.getsource(getattr(images, name))
    assert served_model.TURNS == images.TURNS
    assert (served_model.BACKGROUND, served_model.LEAST_WHITE) == (images.BACKGROUND, images.LEAST_WHITE)
    assert set(images.DAMAGED) - set(served_model.DAMAGED) == {ValueError}  # which is what it raises itself


def test_16_bits_are_turned_upright() -> None:
    upright = np.rot90(read_pixels(sixteen_bit(), 80, 80), -1)
    np.testing.assert_array_equal(read_pixels(sixteen_bit(exif=orientation(6)), 80, 80), upright)


@pytest.mark.parametrize(("width", "height"), [(72, 97), (97, 72), (72, 72), (101, 72), (40, 50), (91, 30)])
def test_pixels_are_those_of_the_evaluation(width: int, height: int) -> None:
    """Images as shards hold them: shorter side at `resize`, or smaller ones, which DALI enlarges a little otherwise."""
    from nvidia.dali import fn, pipeline_def, types

    data = encoded(colours(width, height), "JPEG")

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> Any:
        files = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], batch=True, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        images = fn.resize(images, resize_shorter=72, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop(images, crop=(64, 64))

    expected = np.array(pipeline().run()[0].as_array())[0].astype(int)
    difference = np.abs(read_pixels(data, 72, 64) - expected)
    assert difference.mean() <= (0 if min(width, height) == 72 else 0.5)


def test_the_file_stands_alone() -> None:
    names = set()
    for node in ast.walk(ast.parse(SERVING.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add((node.module or "").split(".")[0])
    standard = {"collections", "io", "json", "pathlib", "struct", "typing"}
    assert names - standard == {"mlflow", "numpy", "pandas", "torch", "torchvision", "PIL", "safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "architecture": "shufflenet_v2_x0_5", "classes": CLASSES, "image_size": 64, "resize": 72,
        "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2],
    }  # fmt: skip
    model = build(config, seed=1)
    with torch.no_grad():
        model.head.weight.mul_(30)  # so that classes differ
    path = tmp_path_factory.mktemp("model") / "finetuned"
    save_classifier(model, config, path)
    return path


@pytest.fixture(scope="module")
def served(folder: Path) -> ImageClassifier:
    model = ImageClassifier()
    model.load_context(PythonModelContext(artifacts={"model": str(folder)}, model_config=None))
    return model


def ask(served: ImageClassifier, files: list[bytes], **params: Any) -> pd.DataFrame:
    return served.predict(PythonModelContext({}, None), pd.DataFrame({"image": files}), params or None)


def test_answers_are_those_of_the_trained_model(served: ImageClassifier, folder: Path) -> None:
    files = list(FILES.values())
    images = torch.stack([torch.from_numpy(read_pixels(file, 72, 64).copy()).permute(2, 0, 1) for file in files])
    with torch.inference_mode():
        expected = load_classifier(folder)[0](images).softmax(1).numpy()
    answers = ask(served, files)
    for row, (ids, names, probabilities) in enumerate(answers[["class_id", "name", "probability"]].values):
        assert probabilities == sorted(probabilities, reverse=True)
        assert names == [CLASSES[index] for index in ids]
        np.testing.assert_allclose(probabilities, expected[row, ids], atol=1e-4)
        assert sum(probabilities) == pytest.approx(1)


def test_as_many_classes_as_asked_for(served: ImageClassifier) -> None:
    assert [len(row) for row in ask(served, [FILES["JPEG"]], top_k=2)["name"]] == [2]
    assert [len(row) for row in ask(served, [FILES["JPEG"]], top_k=99)["name"]] == [len(CLASSES)]
    assert len(ask(served, [])) == 0
    with pytest.raises(MlflowException, match="at least 1"):
        ask(served, [FILES["JPEG"]], top_k=0)


@pytest.mark.parametrize(
    "data", [b"", b"no image", FILES["JPEG"][:200], FILES["JPEG"][: len(FILES["JPEG"]) // 2]],
    ids=["empty", "text", "header only", "half"],
)  # fmt: skip
def test_what_is_no_image_is_refused_by_row(served: ImageClassifier, data: bytes) -> None:
    with pytest.raises(MlflowException, match="input 1 of column `image`") as caught:
        ask(served, [FILES["JPEG"], data])
    assert caught.value.get_http_status_code() == 400


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.registry.served_model.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="101x80 is more than 1000 pixels"):
        read_pixels(FILES["JPEG"], 72, 64)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_pillow_does_not_expect_is_refused_too() -> None:
    """A bomb by its header, and EXIF with a byte that is another one: neither is an error of ours."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    with pytest.raises(ValueError, match="60000x60000 is more than 178956970 pixels"):
        read_pixels(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(100))), 72, 64)
    exif = orientation(6)
    exif[0x010E] = "a"
    turned = encoded(colours(100, 80), "JPEG", exif=exif)
    for place in range(2, 80):
        for value in (0, 2, 5, 7, 12, 255):
            try:
                read_pixels(turned[:place] + bytes([value]) + turned[place + 1 :], 72, 64)
            except ValueError as error:
                assert str(error)


def test_the_readme_posts_a_photo_of_any_size(tmp_path: Path) -> None:
    """Its command, with a `curl` that keeps what it is given; an argument of a program may have 128 KiB at most."""
    readme = (SERVING.parents[2] / "README.md").read_text(encoding="utf-8")
    (command,) = (block for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "/invocations" in block)
    (tmp_path / "curl").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\ncat > posted\n')
    (tmp_path / "curl").chmod(0o755)
    photo = np.random.default_rng(1).bytes(1_000_000)
    (tmp_path / "photo.jpg").write_bytes(photo)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "arguments").read_text().splitlines()[-2:] == ["-d", "@-"]
    table = json.loads((tmp_path / "posted").read_text())["dataframe_split"]
    assert table["columns"] == ["image"]
    assert base64.b64decode(table["data"][0][0]) == photo


def test_config_holds_all_that_serving_reads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {"architecture", "classes", "image_size", "resize", "mean", "std"}


@pytest.mark.parametrize(
    ("architecture", "size", "stem"),
    [
        ("resnet18", 32, "half"), ("resnet18", 32, "small"), ("densenet121", 32, "half"), ("swin_t", 32, "half"),
        ("shufflenet_v2_x0_5", 32, "half"), ("mobilenet_v3_small", 32, "small"), ("vit_b_16", 32, "standard"),
        ("inception_v3", 80, "standard"), ("mnasnet0_5", 32, "standard"),
    ],
)  # fmt: skip
def test_every_network_is_served_as_it_was_trained(architecture: str, size: int, stem: str, tmp_path: Path) -> None:
    config = {
        "architecture": architecture, "stem": stem, "classes": CLASSES, "image_size": size, "resize": size,
        "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
    }  # fmt: skip
    trained = build(config, seed=1, auxiliary_heads=True).eval()
    save_classifier(trained, config, tmp_path / "model")
    loaded, _ = load_classifier(tmp_path / "model")
    net = served_model.network(config, load_file(tmp_path / "model/model.safetensors")).eval()
    images = torch.randint(0, 255, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        logits = net((images.float() - loaded.mean) / loaded.std)
        assert torch.equal(logits, loaded(images))
        assert torch.allclose(logits, trained(images), atol=1e-5)
