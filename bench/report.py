"""How long evaluation's own part takes at ImageNet's size: figures, slices, plots and page of made-up answers.

50,000 test images of 1,000 classes in groups of ten that are taken for each other, as a ResNet-50 does; no model is
asked, so this is what comes on top of inference. `--out DIR` keeps the reports, to be looked at.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.rounds import machine
from stages import evaluate
from stages.data.raw.facts import ACCEPTED, QUARANTINE, write_table
from stages.data.shards.loading.samples.index import Samples
from stages.evaluation.evaluators.cam import overlaid
from stages.evaluation.evaluators.galleries import Galleries, Neighbour, Picture, Suspect, choose
from stages.evaluation.evaluators.training_images import TrainingImages
from stages.evaluation.predictions import Predictions
from stages.pages.images import thumbnail
from stages.params.evaluate import Evaluate

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
        test, facts = answers(options.images, options.classes)
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


def answers(images: int, classes: int) -> tuple[Predictions, pd.DataFrame]:
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
    write_table(pd.DataFrame(columns=QUARANTINE.names), QUARANTINE, evaluate.QUARANTINE)
    for path in ("models/finetuned/model.safetensors", "reports/finetune/metrics.json"):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text(json.dumps({}))


def built(test: Predictions, classes: list[str]) -> dict[str, float]:
    """Writes reports/ and says how many seconds each part took."""
    settings, parts = Evaluate(), {}
    config: dict[str, Any] = {"classes": classes, "architecture": "made-up"}
    config |= {"image_size": SIDE, "resize": 256}
    train = test.samples
    nobody = np.empty(0, np.int64)
    seen = TrainingImages(np.empty((0, 0), np.float32), np.empty(0), np.empty(0), nobody, nobody)
    fresh = Predictions(test.samples.at([]), test.finetuned[:0])
    shown = _galleries(test, classes, settings)
    found = evaluate.Found(test, fresh, seen, nobody, shown, None)

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        parts[name] = time.perf_counter() - began

    with timed("slices"):
        weak = evaluate.find_slices(found, train, config, settings)
    with timed("figures"):
        figures = evaluate.rounded(evaluate.collect_metrics(found, weak, settings))
    with timed("files"):
        evaluate.write(found, train, weak, figures, config, settings)
    return parts


def _galleries(test: Predictions, classes: list[str], settings: Evaluate) -> Galleries:
    """As many pictures as evaluate chooses, with the spectrum of photographs, so that their files are as large."""
    rng = np.random.default_rng(2)
    chosen = choose(test.finetuned, test.samples.label, settings.gallery)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE))) + 1 / SIDE
    waves = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) / frequency).real for _ in range(4)]
    light, *colours = (each / each.std() for each in waves)
    pixels = 128 + 55 * light[..., None] + 15 * np.stack(colours, axis=2)
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    encoded = thumbnail(image)
    heat = thumbnail(overlaid(image, np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)))

    def picture(place: int) -> Picture:
        near = [Neighbour("made-up", classes[0], encoded)] * 3 if place in chosen.mistakes else []
        return Picture(
            test.samples.key[place], classes[test.samples.label[place]], classes[0], 0.9, encoded, heat, near
        )

    suspects = [Suspect("made-up", classes[0], classes[1], 0.1, 0.8, encoded)] * 24
    return Galleries(
        [picture(int(i)) for i in chosen.mistakes],
        [picture(int(i)) for i in chosen.hits],
        {classes[label]: [picture(int(i)) for i in some] for label, some in chosen.by_class.items()},
        suspects,
    )


if __name__ == "__main__":
    sys.exit(main())
