"""Archives and shards of made-up files, as other people pack them."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io

from stages.data.sources.account import Seen
from stages.data.sources.dispatch import Source, read_source
from stages.data.sources.parts import Image, Part


def tar_bytes(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar of files; `mode` as tarfile has it, `w:gz` for a compressed one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def odd_tar(*members: tarfile.TarInfo) -> bytes:
    """A tar whose members are headers alone, after one decent image."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        good = tarfile.TarInfo("set/train/cat/1.jpg")
        good.size = 3
        tar.addfile(good, io.BytesIO(b"one"))
        for member in members:
            tar.addfile(member)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    """A file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def official(folder: Path, devkit: bool = True) -> dict[str, bytes]:
    """The archives of a made-up ILSVRC2012 of two classes; what they hold, as `contents` tells it."""
    train = {wnid: {f"{wnid}_{n}.JPEG": f"{wnid}/{n}".encode() for n in range(3)} for wnid in ("n02", "n01")}
    write(
        folder / "ILSVRC2012_img_train.tar", tar_bytes({f"{wnid}.tar": tar_bytes(each) for wnid, each in train.items()})
    )
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": f"val {n}".encode() for n in range(1, 5)}
    labels = ["n01", "n02", "n02", "n01"]
    write(folder / "ILSVRC2012_img_val.tar", tar_bytes(val))
    if devkit:
        fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
        rows = [(1, "n02", "dog", 0), (2, "n01", "cat", 0), (3, "n00", "animal", 2)]
        meta = io.BytesIO()
        scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
        numbers = {"n02": 1, "n01": 2}
        table = "".join(f"{numbers[label]}\n" for label in labels).encode()
        data = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": table}
        inside = {f"ILSVRC2012_devkit_t12/data/{name}": each for name, each in data.items()}
        write(folder / "ILSVRC2012_devkit_t12.tar.gz", tar_bytes(inside, "w:gz"))
    else:
        write(folder / "LOC_val_solution.csv", kaggle_table(dict(zip(val, labels, strict=True))))
    return {f"train/{wnid}/{name}": data for wnid, each in train.items() for name, data in each.items()} | {
        f"val/{label}/{name}": data for label, (name, data) in zip(labels, val.items(), strict=True)
    }


def kaggle_table(labels: Mapping[str, str]) -> bytes:
    """LOC_val_solution.csv: file name -> wnid."""
    rows = [f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 1 2 3 4 " for name, wnid in labels.items()]
    return "\n".join(["ImageId,PredictionString", *rows, ""]).encode()


def parquet(path: Path, rows: list[dict[str, Any]], names: list[str] | None = None, group: int = 3) -> Path:
    """A shard as Hugging Face writes it: columns from the rows; `names` are those of the classes of `label`."""
    table = pa.Table.from_pylist(rows)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def image(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    """A cell of a column of images."""
    return {"bytes": data, "path": path}


def contents(source: Source | str, incoming: Path | str = "") -> dict[str, bytes]:
    """`split/class/name` with its bytes, of every image that is taken."""
    read = read_source(source, incoming) if isinstance(source, str) else source
    found: dict[str, bytes] = {}
    for part in read.parts:
        for each in taken(read, part):
            assert not each.keys() & found.keys()
            found |= each
    return found


def left_out(source: str, incoming: Path | str = "") -> dict[str, int]:
    """Why files of a source are left out, and how many."""
    return {why: example.files for why, example in _seen(source, incoming).left_out.items()}


def noted(source: str, incoming: Path | str = "") -> dict[str, int]:
    """What is said of images of a source, and of how many."""
    return {what: example.files for what, example in _seen(source, incoming).noted.items()}


def _seen(source: str, incoming: Path | str) -> Seen:
    read, seen = read_source(source, incoming), Seen()
    for item in (*read.left_out, *(item for part in read.parts for item in part.names())):
        seen.see(item, taken=True)
    return seen


def taken(source: Source, part: Part) -> Iterable[dict[str, bytes]]:
    """The images of one part, one by one."""
    for each in (item for item in part.images() if isinstance(item, Image) and source.choice.takes(item)):
        as_taken = source.as_taken(each)
        data = each.data.read()
        assert len(data) == each.size
        yield {f"{as_taken.split}/{as_taken.class_name}/{as_taken.name}": data}
