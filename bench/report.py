"""How long evaluation's own part takes at ImageNet's size: figures, slices, plots and page of made-up answers.

50,000 test images of 1,000 classes in groups of ten that are taken for each other, as a ResNet-50 does; no model
runs, so this is what comes on top of inference. `--out DIR` keeps the reports, to be looked at.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.rounds import machine
from stages.data.raw.facts import ACCEPTED, QUARANTINE
from stages.data.shards.loading.samples.index import Samples
from stages.evaluation import evaluating
from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.evaluators import galleries, label_errors
from stages.evaluation.evaluators.cam import overlaid
from stages.evaluation.evaluators.galleries import GalleryPicture, Neighbour
from stages.evaluation.evaluators.gallery_choice import choose
from stages.evaluation.metrics import Int64
from stages.evaluation.predictions import Predictions
from stages.evaluation.training_pass import TrainingPredictions
from stages.pages.images import thumbnail
from stages.params.evaluate import Evaluate
from stages.runtime import layout
from stages.runtime.tables import write_table

GROUP = 10
SIDE = 224


def main() -> int:
    """Builds the reports and prints how long each part took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="of test")
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--out", type=Path, metavar="DIR", help="keeps reports/ there")
    options = parser.parse_args()
    here = machine()
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        test, facts = predictions(options.images, options.classes)
        write_inputs(facts)
        parts = built(test, [f"class {i:04d}" for i in range(options.classes)])
        size = Path("reports/report.html").stat().st_size
        if options.out:
            shutil.copytree("reports", options.out, dirs_exist_ok=True)
    print(f"{here['cpu']}, {here['cores']} cores, load {here['load']}\n")
    for name, seconds in parts.items():
        print(f"{name:<12}{seconds:8.1f} s")
    print(f"{options.images:,} images, {options.classes:,} classes: {sum(parts.values()):.1f} s, {size / 1e6:.1f} MB")
    return 0


def predictions(images: int, classes: int) -> tuple[Predictions, pd.DataFrame]:
    """About 76 % right and overconfident; most mistakes within a group of ten classes."""
    rng = np.random.default_rng(1)
    labels = np.arange(images) % classes
    logits = rng.normal(size=(images, classes)).astype(np.float32)
    same_group = np.arange(classes) // GROUP == (labels // GROUP)[:, None]
    logits += np.where(same_group, rng.exponential(1.6, (images, classes)), 0).astype(np.float32)
    logits[np.arange(images), labels] += rng.normal(6.0, 2.0, images).astype(np.float32)
    facts = pd.DataFrame({"key": [f"made-up/val/{label:04d}/{i}.JPEG" for i, label in enumerate(labels)]})
    facts = facts.assign(
        batch="made-up", split="test", label=labels, width=rng.integers(200, 900, images),
        height=rng.integers(200, 900, images), bytes=rng.integers(9_000, 300_000, images), format="JPEG", mode="RGB",
        brightness=rng.normal(117, 35, images), contrast=rng.normal(55, 14, images),
    )  # fmt: skip
    samples = Samples(
        key=facts["key"].tolist(), batch=np.zeros(images, np.int32), batch_names=["made-up"], shards=[],
        shard=np.zeros(images, np.int32), offset=np.zeros(images, np.int64), size=np.zeros(images, np.int64),
        label=labels.astype(np.int64),
    )  # fmt: skip
    before = logits + rng.normal(0, 2.5, logits.shape).astype(np.float32)
    return Predictions(samples, logits, before, before + 1), facts


def write_inputs(facts: pd.DataFrame) -> None:
    """What evaluate reads besides the models' answers."""
    write_table(facts.reindex(columns=ACCEPTED.names), ACCEPTED, Path("data/accepted/finetune/made-up.parquet"))
    write_table(pd.DataFrame(columns=QUARANTINE.names), QUARANTINE, layout.QUARANTINE)
    for path in ("models/finetuned/model.safetensors", "reports/finetune/metrics.json"):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text(json.dumps({}))


def built(test: Predictions, classes: list[str]) -> dict[str, float]:
    """Writes reports/ and says how many seconds each part took."""
    settings, parts, n, none = Evaluate(robustness=None), {}, len(test.samples), np.empty(0, np.int64)
    config: dict[str, Any] = {"classes": classes, "architecture": "made-up", "image_size": SIDE, "resize": 256}
    no_model: Any = None
    inputs = EvaluationInputs(
        settings=settings,
        config=config,
        model=no_model,
        compute=no_model,
        train=test.samples,
        test=test,
        fresh=Predictions(test.samples.at([]), test.finetuned[:0]),
        training=TrainingPredictions(
            np.empty((0, 0), np.float32), np.ones(n), np.zeros(n), np.zeros(n, np.int64), none
        ),
        chosen=choose(test.scores, test.labels, settings.gallery),
    )
    results = {}
    for evaluator in evaluating.EVALUATORS:
        began = time.perf_counter()
        made_up = MADE_UP.get(evaluator.name, evaluator.measure)
        results[evaluator.name] = made_up(inputs)
        parts[evaluator.name] = time.perf_counter() - began
    began = time.perf_counter()
    evaluating.write(inputs, results)
    return parts | {"files": time.perf_counter() - began}


def _picture() -> tuple[bytes, bytes]:
    """An image with the spectrum of photographs, so that its file is as large, and one with a heat map."""
    rng = np.random.default_rng(2)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE))) + 1 / SIDE
    waves = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) / frequency).real for _ in range(4)]
    light, *colours = (each / each.std() for each in waves)
    pixels = 128 + 55 * light[..., None] + 15 * np.stack(colours, axis=2)
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    heat = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    return thumbnail(image), thumbnail(overlaid(image, heat))


def _galleries(inputs: EvaluationInputs) -> Result:
    """As many pictures as evaluate shows."""
    test, classes, chosen, (encoded, heat) = inputs.test.samples, inputs.classes, inputs.chosen, _picture()

    def pictures(indexes: Int64) -> list[GalleryPicture]:
        return [
            GalleryPicture(
                test.key[i], classes[test.label[i]], classes[0], 0.9, encoded, heat,
                [Neighbour("made-up", classes[0], encoded)] * 3 if i in chosen.mistakes else [],
            )
            for i in indexes
        ]  # fmt: skip

    by_class = {classes[label]: pictures(some) for label, some in chosen.by_class.items()}
    values = {"mistakes": pictures(chosen.mistakes), "correct": pictures(chosen.correct), "by_class": by_class}
    return Result(ReportSection(TEMPLATES / "galleries.html.j2", values))


def _label_errors(inputs: EvaluationInputs) -> Result:
    encoded, _ = _picture()
    suspect = {"key": "made-up", "label": inputs.classes[0], "suggested": inputs.classes[1], "jpeg": encoded}
    suspects = [suspect | {"label_probability": 0.1, "suggested_probability": 0.8}] * label_errors.SHOWN
    return Result(ReportSection(TEMPLATES / "label_errors.html.j2", {"suspects": suspects, "found": len(suspects)}))


TEMPLATES = Path(galleries.__file__).parent
MADE_UP = {"galleries": _galleries, "label_errors": _label_errors}
"""Of evaluators that need a model or images."""


if __name__ == "__main__":
    sys.exit(main())
