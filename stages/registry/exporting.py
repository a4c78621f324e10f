"""Exports a registered version: writes the file, holds it against the original, and records it with the version."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples
from stages.evaluation import exporting
from stages.evaluation.predictions import read_test_samples
from stages.registry import artifacts, lineage, records, versions
from stages.registry.card.review_page import with_exports
from stages.registry.client import reachable
from stages.registry.mlflow_types import Run
from stages.registry.tags import EXPORT
from stages.registry.versions import Version
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import check_folder, replaced_file, sha256, write_json, write_text
from stages.runtime.progress import progress, worker_count
from stages.training.networks.models import Classifier, load_classifier

logger = logging.getLogger(__name__)

BATCH = 64
STEPS = (
    "decode to RGB, 8 bits a channel, turned upright as the EXIF orientation says",
    "resize: shorter side to `resize`, bicubic with antialiasing (Pillow's BICUBIC)",
    "crop the middle `image_size` x `image_size`: left = (width - image_size + 1) // 2, top likewise",
    "channels first; do not normalise, the model does",
)


@dataclass(frozen=True)
class Original:
    """A registered version as it was downloaded."""

    model: Classifier
    config: dict[str, Any]
    """config.json"""
    bytes: int
    """Size of its weights."""


def export_version(name: str, which: str, form: str, out: Path | None, threads: int) -> None:
    """Finds the version, exports it, and prints the figures.

    Args:
        which: `/N` or `@ALIAS`; empty: the newest version.
        form: `onnx` or `pt2`.
        out: folder of the file; None: models/exports/NAME/N.
        threads: on the CPU, while latency is measured.

    Raises:
        StageError: as `export`, or `out` cannot be written.
    """
    version = versions.by_address(f"models:/{name}{which}") if which else versions.newest_registered(name)
    folder = out or layout.EXPORTS / name / str(version.number)
    check_folder(folder, "--out")
    with reachable():
        figures = export(version, form, folder, threads)
    print(f"{folder / f'model.{form}'}: {name} version {version.number}, {figures['bytes'] / 1e6:.1f} MB")
    for device in ("cpu", "gpu"):
        print(_line(device.upper(), figures[device]))
    print(f"recorded with version {version.number}; `make ui` shows its run, review.html the figures")


def _line(device: str, figures: dict[str, Any] | None) -> str:
    if not figures:
        return f"{device}: not measured (none here)"
    parts = [
        f"{who} {times['single_ms'][0]:.1f} ms an image, {times['batch_ms'][0]:.1f} ms a batch of 32"
        if (times := figures[who])
        else f"{who} not measured (this ONNX Runtime has no CUDA)"
        for who in ("exported", "original")
    ]
    return f"{device}: " + "; ".join(parts)


def export(version: Version, form: str, out: Path, threads: int) -> dict[str, Any]:
    """Writes `model.<form>` and `model.<form>.json` into `out`, and records them with the version.

    Args:
        threads: on the CPU, while latency is measured.

    Returns:
        the figures, as exports.json has them.

    Raises:
        StageError: the version or the test images cannot be had, or the file does not predict as the original does.
    """
    samples = _test_images()
    run = lineage.get_run(version.run_id)
    if run is None:
        raise StageError(
            f"the run {version.run_id} of version {version.number} is gone, so there is no place to keep it"
        )
    original = _original(version)
    facts = facts_of(version, original.config, form)
    path = out / f"model.{form}"
    with replaced_file(path) as aside:
        figures = _write(original, facts, form, aside, samples, threads)
    write_json(path.with_name(f"{path.name}.json"), facts | {"sha256": figures["sha256"]})
    _record(version, run, form, path, figures)
    return figures


def _test_images() -> Samples:
    samples = read_test_samples()
    if not len(samples):
        raise StageError(
            "data/shards/finetune holds no test image, so an export could not be held against the original; `dvc pull "
            "data/shards/finetune` or `dvc repro` brings them"
        )
    return samples


def _original(version: Version) -> Original:
    with tempfile.TemporaryDirectory() as folder:
        artifacts.download_model(version, Path(folder))
        found = artifacts.weights_sha256(Path(folder))
        if not found or found != version.sha256:
            what = f"has weights with sha256 {found}" if found else f"has no {layout.WEIGHTS}"
            raise StageError(f"version {version.number} {what}, but its tag says {version.sha256 or 'nothing'}")
        (weights,) = Path(folder).rglob(layout.WEIGHTS)
        model, config = load_classifier(weights.parent)
        return Original(model, config, weights.stat().st_size)


def facts_of(version: Version, config: dict[str, Any], form: str) -> dict[str, Any]:
    """What a user of the file has to know."""
    side, classes = config["image_size"], config["classes"]
    return {
        "model": version.name,
        "version": version.number,
        "weights_sha256": version.sha256,
        "format": form,
        "architecture": config["architecture"],
        "input": {"name": "images", "dtype": "uint8", "shape": ["n", 3, side, side], "values": "RGB, 0 to 255"},
        "output": {"name": "logits", "dtype": "float32", "shape": ["n", len(classes)], "probabilities": "softmax"},
        "resize": config["resize"],
        "image_size": side,
        "preprocessing": list(STEPS),
        "normalisation": {"where": "in the model", "mean": config["mean"], "std": config["std"]},
        "classes": classes,
    }


# ------------------------------------------------------------------------------------- held against the original


def _write(
    original: Original, facts: dict[str, Any], form: str, path: Path, samples: Samples, threads: int
) -> dict[str, Any]:
    """Writes the file to `path`, checks and measures it; the figures."""
    exporting.write(original.model, facts, form, path)
    torch.set_num_threads(worker_count())
    exported = exporting.open_exported(path, form, worker_count())
    assert exported is not None  # every ONNX Runtime has the CPU
    shown = progress(_pixels(samples, original.config), -(-len(samples) // BATCH), "held against the original, batches")
    difference = exporting.compare(exporting.in_torch(original.model), exported, shown)
    logger.info(
        "%s: on %d test images probabilities at most %.2g away, logits %.2g, other first place: %d",
        *(form, difference.images, difference.probability, difference.logit, difference.changed),
    )
    exporting.check(difference, form)
    runtime = f", ONNX Runtime {onnxruntime.__version__}" if form == "onnx" else ""
    pixels = next(_pixels(samples.at(range(min(exporting.BATCH, len(samples)))), original.config))
    return {
        "file": f"exports/model.{form}",
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "original_bytes": original.bytes,
        "images": difference.images,
        "max_probability_difference": difference.probability,
        "max_logit_difference": difference.logit,
        "changed": difference.changed,
        "cpu": _on_cpu(original, form, path, pixels, threads),
        "gpu": _on_gpu(original, form, path, pixels),
        "made_with": f"torch {torch.__version__}{runtime}",
    }


def _pixels(samples: Samples, config: dict[str, Any]) -> Iterator[exporting.Pixels]:
    """As the evaluation sees them, (n, 3, S, S)."""
    size = {"image_size": config["image_size"], "resize": config["resize"]}
    batches = evaluation_batches(samples, **size, batch_size=BATCH, threads=worker_count(), device="cpu")
    return (np.ascontiguousarray(images.numpy()) for images, _ in batches)


def _on_cpu(original: Original, form: str, path: Path, pixels: exporting.Pixels, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    exported = exporting.open_exported(path, form, threads)
    assert exported is not None
    return {
        "name": str(torch.cpu.get_capabilities().get("cpu_name", "of unknown kind")),
        "threads": threads,
        "exported": exporting.latency(exported, pixels),
        "original": exporting.latency(exporting.in_torch(original.model), pixels),
    }


def _on_gpu(original: Original, form: str, path: Path, pixels: exporting.Pixels) -> dict[str, Any] | None:
    """None without a GPU; `exported` is null where ONNX Runtime was built without CUDA, as the locked one is."""
    if not torch.cuda.is_available():
        return None
    exported = exporting.open_exported(path, form, 1, "cuda")
    return {
        "name": torch.cuda.get_device_name(),
        "exported": exporting.latency(exported, pixels) if exported else None,
        # The last use of the model: it stays on the GPU.
        "original": exporting.latency(exporting.in_torch(original.model.to("cuda"), "cuda"), pixels),
    }


# --------------------------------------------------------------------------------------------------- in the registry


def _record(version: Version, run: Run, form: str, path: Path, figures: dict[str, Any]) -> None:
    """Files and figures as artifacts of the run, and the page with them; the tag comes last."""
    exports = records.exports(version) | {form: figures}
    with tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary, records.own_folder(version.name))
        (own / "exports").mkdir(parents=True)
        for file in (path, path.with_name(f"{path.name}.json")):
            shutil.copyfile(file, own / "exports" / file.name)
        write_json(own / records.EXPORTS, exports)
        if (page := records.review_page(version)) is not None:
            write_text(own / records.REVIEW, with_exports(page, exports))
        else:
            logger.warning("warning: the run of version %d has no review.html to show this in", version.number)
        artifacts.log_files(run, Path(temporary))
    versions.set_tags(version, {EXPORT.format(format=form): figures["sha256"]})
