"""How fast are images made into shards, per core, and how much of them is lost?

    python -m bench.sharding --images DIR --check

Ours is the function that the stage `shard` calls for every shard, with all that it does besides: the checksum of the
raw bytes, the header's orientation, the sums of all pixels, the index file, checksums, flushing to the disk. The peers
only decode, resize to a shorter side of 256 px, compress (quality 90, 4:2:0) and write a tar; like ours they leave
images that are small already as they are. All work on one shard of all images, on one core, and count CPU time.

Loss is measured against PIL's Lanczos of the same image in the same size, not compressed.
"""

import hashlib
import io
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bench.rounds import Bound, Candidate, Goal, Table, arguments, machine, measured, report, versions
from stages.data.raw.tars import read_at
from stages.data.shards.writing import PlannedShard, RawImage, plan_split, prepare, shard_image, write_shard
from stages.params.shard import Shard

RESIZE, QUALITY = 256, 90
OURS, PIL, TORCHVISION = "Synset", "PIL bicubic", "torchvision.io"
PACKAGES = ("opencv-python-headless", "simplejpeg", "pillow", "torch", "torchvision", "numpy")
FASTER, AT_LEAST_DB = 1.5, 34.0


def collect(images: Path, folder: Path) -> list[RawImage]:
    """All JPEGs below `images` in one raw tar `<folder>/all.tar`.

    Raises:
        SystemExit: there are none.
    """
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"error: no .jpg or .jpeg below {images}")
    found = []
    with tarfile.open(folder / "all.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for path in files:
            data = path.read_bytes()
            name = path.relative_to(images).as_posix()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            offset = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            found.append(
                RawImage(f"bench/all/{name}", "all.tar", offset, len(data), hashlib.sha256(data).hexdigest(), 0)
            )
    return found


def ours(images: Sequence[RawImage], folder: Path) -> Callable[[], float]:
    """A round of the stage's own function."""
    work = folder / "work"
    rows = pd.DataFrame(images, columns=list(RawImage._fields))
    shard = Shard(resize=RESIZE, quality=QUALITY, images_per_shard=len(images))

    def run() -> float:
        shutil.rmtree(work, ignore_errors=True)  # or it would find the shard finished
        prepare(work, folder / "out")
        (planned,) = plan_split(rows, work, "train", shard)
        return per_second(lambda: write_planned(planned, work, folder), len(images))

    return run


def write_planned(planned: PlannedShard, work: Path, raw: Path) -> None:
    """As the stage has it done by its workers."""
    write_shard(planned, work=work, raw=raw, resize=RESIZE, quality=QUALITY)


def peer(images: Sequence[RawImage], folder: Path, compress: Callable[[bytes], bytes]) -> Callable[[], float]:
    """A round of a loop that writes what `compress` makes of every image into a tar."""

    def write() -> None:
        with tarfile.open(folder / "peer.tar", "w") as tar:
            for number, image in enumerate(images):
                data = compress(read_at(folder / image.tar, image.offset, image.bytes))
                for extension, content in (("jpg", data), ("cls", b"00000")):
                    info = tarfile.TarInfo(f"{number:08d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    return lambda: per_second(write, len(images))


def per_second(work: Callable[[], None], images: int) -> float:
    """Images per second of CPU time."""
    began = time.process_time()
    work()
    return images / (time.process_time() - began)


def new_size(width: int, height: int) -> tuple[int, int]:
    """As `resize_shorter` has it."""
    shorter = min(width, height)
    return max(RESIZE, round(width * RESIZE / shorter)), max(RESIZE, round(height * RESIZE / shorter))


def pil_bicubic(data: bytes) -> bytes:
    """The peer that the goal names."""
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) <= RESIZE:
            return data
        small = image.convert("RGB").resize(new_size(*image.size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def torchvision_bicubic(data: bytes) -> bytes:
    """torchvision's own decoder, antialiased bicubic on uint8, and encoder."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    height, width = pixels.shape[1:]
    if min(height, width) <= RESIZE:
        return data
    size = list(reversed(new_size(width, height)))
    small = resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return bytes(encode_jpeg(small, QUALITY).numpy().tobytes())


def decibels(images: Sequence[RawImage], folder: Path, compress: Callable[[bytes], bytes]) -> list[float]:
    """Peak signal-to-noise ratio of every image that is made smaller."""
    found = []
    for image in images:
        data = read_at(folder / image.tar, image.offset, image.bytes)
        with Image.open(io.BytesIO(data)) as whole:
            if min(whole.size) <= RESIZE:
                continue
            reference = whole.convert("RGB").resize(new_size(*whole.size), Image.Resampling.LANCZOS)
        with Image.open(io.BytesIO(compress(data))) as small:
            difference = np.asarray(small, np.float64) - np.asarray(reference, np.float64)
        found.append(float(10 * np.log10(255**2 / np.mean(difference**2))))
    return found


def main(options: Sequence[str] | None = None) -> int:
    """Prints both tables; 1 with --check where a goal is missed."""
    import torch

    given = arguments(__doc__).parse_args(options)
    torch.set_num_threads(1)
    here = machine()
    peers = {PIL: pil_bicubic, TORCHVISION: torchvision_bicubic}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = collect(given.images, folder)
        candidates = [Candidate(OURS, "ours", ours(images, folder))]
        candidates += [Candidate(each, "peer", peer(images, folder, compress)) for each, compress in peers.items()]
        speed = measured(
            f"sharding to {RESIZE} px", "images/CPU-s", candidates, [Goal(OURS, PIL, FASTER)], rounds=given.rounds
        )
        loss = {each: decibels(images, folder, compress) for each, compress in peers.items()}
        loss = {OURS: decibels(images, folder, lambda data: shard_image(data, RESIZE, QUALITY)[0])} | loss
    quality = Table("likeness, by image", "dB", speed.roles, loss, [Bound(OURS, "at least", AT_LEAST_DB)])
    return report([speed, quality], given, here, versions(*PACKAGES))


if __name__ == "__main__":
    sys.exit(main())
