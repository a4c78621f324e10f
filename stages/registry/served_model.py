"""The model as MLflow serves it: an image file in, class names and probabilities out ("models from code").

This file is copied into every registered version and runs there alone. It therefore imports nothing of `stages`: two
versions loaded in one process would otherwise share the code of the first. It repeats stages.data.raw.images (decoding)
and stages.training.networks.models (architecture, stem, normalisation); tests compare the decoding, line by line and
pixel for pixel, and the answers, and every registration compares these with the evaluation's.
"""

import io
import json
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
import torchvision
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import ExifTags, Image, UnidentifiedImageError
from safetensors.torch import load_file
from torch import nn

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
MAX_PIXELS = 178_956_970
"""A small file may claim to be a huge image: above this it is refused before it is decoded."""
Image.MAX_IMAGE_PIXELS = None  # Pillow's own check of the same would end as an error of the server
DAMAGED = (
    OSError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError, struct.error,
    MemoryError,
)  # fmt: skip
"""What Pillow raises at a damaged image, besides ValueError."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation."""
BACKGROUND = (255, 255, 255, 255)
"""What transparent pixels show: white, as on a page. Part of what a model learns, so serving repeats it."""
LEAST_WHITE = 2**14
"""16-bit grey whose largest value is below is rather of 10, 12 or 14 bits than of a very dark scene."""
BATCH = 64


def read_pixels(data: bytes, resize: int, image_size: int) -> np.ndarray:
    """What the model sees of an image file: upright, RGB, shorter side at `resize`, its middle; (H, W, 3) uint8.

    Raises:
        ValueError: not an image, a damaged one, or one of too many pixels.
    """
    if not data:
        raise ValueError("empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            upright = _on_background(_upright(image), data)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except DAMAGED as error:
        raise ValueError(f"a damaged image: {error}") from error
    return np.asarray(_centre(_resize_shorter(upright, resize), image_size))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its orientation says. Pillow's own function writes all other EXIF tags anew, and fails on odd ones."""
    image.load()  # turns a TIFF, which then has no orientation any more
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image, data: bytes) -> Image.Image:
    """16-bit grey keeps its 8 highest bits: PIL's own conversion would clip everything above 255 to white.

    Raises:
        ValueError: what stands for white is not known.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of no known range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        if data[:4] == b"\x89PNG" and data[24] == 16:  # Pillow has kept the high bytes
            # Where pixels are transparent, all colours may be black; how opaque they are uses the same range.
            lows, highs = np.atleast_2d(image.getextrema()).T
            opaque = image.mode[-1] in "Aa" and lows[-1] == 255
            _refuse_few_bits(int(max(highs[:-1] if opaque else highs)) << 8 | 255)
        return image
    pixels = np.asarray(image).astype(np.int64)
    low, high = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
    if low < 0 or high >> 16:
        raise ValueError(f"pixels from {low} to {high} are beyond 16 bits; save it with 8 or 16 bits")
    bits = _significant_bits(data)
    if not bits or high >> bits:  # samples are scaled to 16 bits, as the specification wants it
        bits = 16
        _refuse_few_bits(high)
    return Image.fromarray((pixels << 8 >> bits).astype(np.uint8))


def _refuse_few_bits(high: int) -> None:
    if 0 < high < LEAST_WHITE:
        raise ValueError(
            f"16-bit pixels use only {high.bit_length()} bits and nothing says what is white: they would come out "
            "nearly black; save it with 8 bits, or scaled to 16"
        )


def _significant_bits(data: bytes) -> int:
    """Of a grey PNG, as its chunk sBIT says (PNG specification, 11.3.2.3); 0 where there is none."""
    at = 8
    while data[:4] == b"\x89PNG" and (name := data[at + 4 : at + 8]) not in (b"", b"IDAT"):
        length = int.from_bytes(data[at : at + 4], "big")
        if name == b"sBIT":
            return data[at + 8] if length == 1 and data[at + 8] <= 16 else 0
        at += 12 + length
    return 0


def _on_background(image: Image.Image, data: bytes) -> Image.Image:
    """8-bit RGB; what is transparent shows `BACKGROUND`."""
    key = image.info.get("transparency") if image.mode.startswith("I") else None
    opaque = None if key is None else Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    image = _eight_bit(image, data)
    if opaque is not None:
        image.putalpha(opaque)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    ground = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """Larger ones as when shards are written, smaller ones as the evaluation enlarges them."""
    shorter = min(image.size)
    if shorter == side:
        return image
    width, height = (max(side, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _centre(image: Image.Image, side: int) -> Image.Image:
    # An odd margin is halved as DALI does it: rounded up.
    left, top = ((length - side + 1) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def network(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """The architecture of config.json with these weights; it takes normalised images."""
    architecture, size = config["architecture"], config["image_size"]
    options: dict[str, Any] = {}
    if architecture in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    elif architecture.startswith("vit_"):
        options = {"image_size": size}
    elif architecture == "maxvit_t":
        options = {"input_size": (size, size)}
    net = torchvision.models.get_model(architecture, weights=None, num_classes=len(config["classes"]), **options)
    if config.get("stem", "standard") != "standard":
        _change_stem(net, config["stem"])
    versioned = OrderedDict(weights)  # MNASNet insists on the version of its layers, which safetensors does not keep
    versioned._metadata = net.state_dict()._metadata  # type: ignore[attr-defined]
    net.load_state_dict(versioned)
    return net


def _change_stem(net: nn.Module, stem: str) -> None:
    """As when it was trained: a smaller first convolution, and no max-pool in the stem."""
    name, first = next((name, each) for name, each in net.named_modules() if isinstance(each, nn.Conv2d))
    pools = [name for name, each in net.named_modules() if isinstance(each, nn.MaxPool2d)]
    kernel, stride = (2, 2) if first.kernel_size == (4, 4) else (3, 2 if stem == "half" else 1)
    if first.kernel_size == (7, 7) or pools[:1] == ["maxpool"]:
        net.set_submodule(pools[0], nn.Identity())
    bias = first.bias is not None
    net.set_submodule(name, nn.Conv2d(3, first.out_channels, kernel, stride, padding=kernel // 3, bias=bias))


class ImageClassifier(PythonModel):
    """`image` (the bytes of a file) to the classes of highest probability, best first."""

    # MLflow insists on this parameter's name.
    def load_context(self, context: PythonModelContext) -> None:
        """Reads config.json and model.safetensors of the artifact `model`; nothing is unpickled."""
        folder = Path(context.artifacts["model"])
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.classes: list[str] = self.config["classes"]
        self.network = network(self.config, load_file(folder / "model.safetensors")).eval()
        self.mean = 255 * torch.tensor(self.config["mean"]).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(self.config["std"]).view(1, 3, 1, 1)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row per image: `class_id`, `name` and `probability`, each a list of `top_k` values.

        Raises:
            MlflowException: BAD_REQUEST (HTTP 400) where an input is no image, naming its row.
        """
        top_k = int((params or {}).get("top_k", 5))
        if top_k < 1:
            raise MlflowException(f"top_k must be at least 1, got {top_k}", error_code=BAD_REQUEST)
        images = [self._pixels(row, data) for row, data in enumerate(model_input["image"])]
        probabilities, class_ids = self._probabilities(images).topk(min(top_k, len(self.classes)), dim=1)
        return pd.DataFrame(
            {
                "class_id": class_ids.tolist(),
                "name": [[self.classes[index] for index in row] for row in class_ids.tolist()],
                "probability": probabilities.tolist(),
            }
        )

    def _pixels(self, row: int, data: bytes) -> torch.Tensor:
        try:
            pixels = read_pixels(data, self.config["resize"], self.config["image_size"])
        except ValueError as error:
            raise MlflowException(f"input {row} of column `image`: {error}", error_code=BAD_REQUEST) from error
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    @torch.inference_mode()
    def _probabilities(self, images: list[torch.Tensor]) -> torch.Tensor:
        """(N, classes), float64, from N images (3, H, W) uint8."""
        answers = [torch.zeros(0, len(self.classes), dtype=torch.float64)]
        for start in range(0, len(images), BATCH):
            batch = torch.stack(images[start : start + BATCH]).float()
            answers.append(self.network((batch - self.mean) / self.std).double().softmax(dim=1))
        return torch.cat(answers)


mlflow.models.set_model(ImageClassifier())
