"""Exports a registered version as one file that runs without this project: ONNX, or PyTorch's own pt2.

The model takes pixels: images (n, 3, S, S) uint8, RGB, 0..255, any number n, after decoding, resizing and cropping. It
normalises them itself and gives logits (n, classes) float32. Decoding is left outside because no two runtimes do it
alike; what to do before and after stands in model.<format>.json beside the file, and within it.

A file is only kept where, opened anew, it answers as the original does on the whole test split of the shards that are
here. Size and latency are measured for both. File, JSON and figures go to the run of the version, whose review.html
shows them.
"""

import argparse
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.params.register import Register
from stages.registry import artifacts, gate_review, model_process, versions
from stages.registry.client import reachable
from stages.registry.gate_review import own_folder
from stages.registry.versions import Version
from stages.runtime.command import StageError, positive, run
from stages.runtime.files import replaced_file, sha256, write_json, write_text
from stages.runtime.params_file import load_section
from stages.runtime.progress import progress, worker_count

if TYPE_CHECKING:
    from mlflow.entities import Run

    from stages.data.shards.loading.samples.index import Samples
    from stages.evaluation.exporting import Difference, Pixels
    from stages.training.networks.models import Classifier

logger = logging.getLogger(__name__)

FORMATS = ("onnx", "pt2")
OUT = Path("models/exports")
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

    model: "Classifier"
    config: dict[str, Any]
    """config.json"""
    bytes: int
    """Of its model.safetensors."""


def export(version: Version, form: str, out: Path, threads: int) -> dict[str, Any]:
    """Writes `model.<form>` and `model.<form>.json` into `out`, and records them with the version.

    Args:
        threads: on the CPU, while latency is measured.

    Returns:
        the figures, as exports.json has them.

    Raises:
        StageError: the version or the test images cannot be had, or the file does not answer as the original does.
    """
    samples = _test_images()
    run_of_version = gate_review.find_run(version.run_id)
    if run_of_version is None:
        raise StageError(
            f"the run {version.run_id} of version {version.number} is gone, so there is no place to keep it"
        )
    original = _original(version)
    facts = _facts(version, original.config, form)
    path = out / f"model.{form}"
    with replaced_file(path) as aside:
        figures = _written(original, facts, form, aside, samples, threads)
    write_json(path.with_name(f"{path.name}.json"), facts | {"sha256": figures["sha256"]})
    _record(version, run_of_version, form, path, figures)
    return figures


def _test_images() -> "Samples":
    from stages.data.shards.loading.samples.index import read_samples
    from stages.data.shards.loading.samples.shard_sets import shard_sets

    samples = read_samples(shard_sets("finetune"), "test")
    if not len(samples):
        raise StageError(
            "data/shards/finetune holds no test image, so an export could not be held against the original; `dvc pull "
            "data/shards/finetune` or `dvc repro` brings them"
        )
    return samples


def _original(version: Version) -> Original:
    from stages.training.networks.models import load_classifier

    with tempfile.TemporaryDirectory() as folder:
        artifacts.download_model(version, Path(folder))
        found = artifacts.weights_sha256(Path(folder))
        if not found or found != version.sha256:
            what = f"has weights with sha256 {found}" if found else "has no model.safetensors"
            raise StageError(f"version {version.number} {what}, but its tag says {version.sha256 or 'nothing'}")
        (weights,) = Path(folder).rglob("model.safetensors")
        model, config = load_classifier(weights.parent)
        return Original(model, config, weights.stat().st_size)


def _facts(version: Version, config: dict[str, Any], form: str) -> dict[str, Any]:
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


def _written(
    original: Original, facts: dict[str, Any], form: str, path: Path, samples: "Samples", threads: int
) -> dict[str, Any]:
    """Writes the file to `path`, checks and measures it; the figures."""
    from stages.evaluation import exporting

    exporting.write(original.model, facts, form, path)
    difference = _difference(original, form, path, samples)
    logger.info(
        "%s: on %d test images probabilities at most %.2g away, logits %.2g, other first place: %d",
        form, difference.images, difference.probability, difference.logit, difference.changed,
    )  # fmt: skip
    exporting.check(difference, form)
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
        "made_with": _made_with(form),
    }


def _difference(original: Original, form: str, path: Path, samples: "Samples") -> "Difference":
    import torch

    from stages.evaluation import exporting

    torch.set_num_threads(worker_count())
    exported = exporting.open_exported(path, form, worker_count())
    assert exported is not None  # every ONNX Runtime has the CPU
    batches = _pixels(samples, original.config)
    shown = progress(batches, -(-len(samples) // BATCH), "held against the original, batches")
    return exporting.compare(exporting.in_torch(original.model), exported, shown)


def _pixels(samples: "Samples", config: dict[str, Any]) -> "Iterator[Pixels]":
    """As the evaluation sees them, (n, 3, S, S)."""
    import numpy as np

    from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches

    batches = evaluation_batches(
        samples, image_size=config["image_size"], resize=config["resize"], batch_size=BATCH,
        threads=worker_count(), device="cpu",
    )  # fmt: skip
    return (np.ascontiguousarray(images.numpy()) for images, _ in batches)


def _on_cpu(original: Original, form: str, path: Path, pixels: "Pixels", threads: int) -> dict[str, Any]:
    import torch

    from stages.evaluation import exporting

    torch.set_num_threads(threads)
    exported = exporting.open_exported(path, form, threads)
    assert exported is not None
    return {
        "name": str(torch.cpu.get_capabilities().get("cpu_name", "of unknown kind")),
        "threads": threads,
        "exported": exporting.latency(exported, pixels),
        "original": exporting.latency(exporting.in_torch(original.model), pixels),
    }


def _on_gpu(original: Original, form: str, path: Path, pixels: "Pixels") -> dict[str, Any] | None:
    """None without a GPU; `exported` is null where ONNX Runtime was built without CUDA, as the locked one is."""
    import torch

    from stages.evaluation import exporting

    if not torch.cuda.is_available():
        return None
    exported = exporting.open_exported(path, form, 1, "cuda")
    return {
        "name": torch.cuda.get_device_name(),
        "exported": exporting.latency(exported, pixels) if exported else None,
        # The last use of the model: it stays on the GPU.
        "original": exporting.latency(exporting.in_torch(original.model.to("cuda"), "cuda"), pixels),
    }


def _made_with(form: str) -> str:
    import torch

    made = f"torch {torch.__version__}"
    if form == "onnx":
        import onnxruntime

        made += f", ONNX Runtime {onnxruntime.__version__}"
    return made


# --------------------------------------------------------------------------------------------------- in the registry


def _record(version: Version, its_run: "Run", form: str, path: Path, figures: dict[str, Any]) -> None:
    """Files and figures as artifacts of the run, the page anew; the tag comes last."""
    from stages.registry.card.review_page import with_exports

    exports = gate_review.recorded_exports(version) | {form: figures}
    with tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary, own_folder(version.name))
        (own / "exports").mkdir(parents=True)
        for file in (path, path.with_name(f"{path.name}.json")):
            shutil.copyfile(file, own / "exports" / file.name)
        write_json(own / gate_review.EXPORTS, exports)
        review = f"{own_folder(version.name)}/review.html"
        with tempfile.TemporaryDirectory() as before:
            if page := artifacts.download(version.run_id, review, Path(before)):
                write_text(own / "review.html", with_exports(page.read_text(encoding="utf-8"), exports))
            else:
                logger.warning("warning: the run of version %d has no review.html to show this in", version.number)
        artifacts.log_files(its_run, Path(temporary))
    versions.set_tags(version, {f"export.{form}": figures["sha256"]})


# ---------------------------------------------------------------------------------------------------------- command


def main() -> None:
    """Finds the version, exports it, and says what came of it."""
    arguments = _arguments()
    name = load_section("register", Register).name
    if arguments.version or arguments.alias:
        which = f"/{arguments.version}" if arguments.version else f"@{arguments.alias}"
        version = model_process.find(f"models:/{name}{which}")
    else:
        version = model_process.newest(name)
    out: Path = arguments.out or OUT / name / str(version.number)
    _check_folder(out)
    with reachable():
        figures = export(version, arguments.format, out, arguments.threads)
    print(f"{out / f'model.{arguments.format}'}: {name} version {version.number}, {figures['bytes'] / 1e6:.1f} MB")
    for device in ("cpu", "gpu"):
        print(_line(device.upper(), figures[device]))
    print(f"recorded with version {version.number}; `make ui` shows its run, review.html the figures")


def _check_folder(out: Path) -> None:
    there = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise StageError(f"--out {out}: {there} is no folder that may be written to")


def _line(device: str, figures: dict[str, Any] | None) -> str:
    if not figures:
        return f"{device}: not measured (none here)"
    said = [
        f"{who} {times['single_ms'][0]:.1f} ms an image, {times['batch_ms'][0]:.1f} ms a batch of 32"
        if (times := figures[who])
        else f"{who} not measured (this ONNX Runtime has no CUDA)"
        for who in ("exported", "original")
    ]
    return f"{device}: " + "; ".join(said)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=positive, metavar="N", help="of `register.name`; default: the newest")
    which.add_argument("--alias", metavar="NAME", help="the version that has it: serving, champion, challenger")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {OUT}/NAME/N, which git ignores")
    parser.add_argument(
        "--threads", type=positive, default=1, help="of the CPU while latency is measured (%(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
