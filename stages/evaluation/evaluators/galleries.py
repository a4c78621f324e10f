"""Galleries: test images for a reviewer, with what speaks for the prediction, and similar training images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.evaluators.cam import heat_maps
from stages.pages.images import jpeg_thumbnail, thumbnail

name = "galleries"


@dataclass(frozen=True)
class Neighbour:
    """A training image that is similar to the model."""

    key: str
    label: str
    jpeg: bytes


@dataclass(frozen=True)
class GalleryPicture:
    """A test image, its class, its prediction, and why."""

    key: str
    actual: str
    predicted: str
    probability: float
    seen: bytes
    """The crop that the model saw, encoded."""
    heat: bytes
    """The crop with a heat map of what spoke for the prediction."""
    neighbours: Sequence[Neighbour] = ()


def measure(inputs: EvaluationInputs) -> Result:
    """The pictures of `inputs.chosen`; it has no figures."""
    chosen, classes = inputs.chosen, inputs.classes
    pictures = _pictures(inputs)
    return Result(
        ReportSection(
            Path(__file__).with_suffix(".html.j2"),
            {
                "mistakes": [pictures[int(i)] for i in chosen.mistakes],
                "correct": [pictures[int(i)] for i in chosen.correct],
                "by_class": {
                    classes[label]: [pictures[int(i)] for i in some] for label, some in chosen.by_class.items()
                },
            },
        )
    )


def _pictures(inputs: EvaluationInputs) -> dict[int, GalleryPicture]:
    """By index of the test image."""
    test, train, classes, config = inputs.test.samples, inputs.train, inputs.classes, inputs.config
    scores, indexes = inputs.test.scores, inputs.chosen.all
    images = heat_maps(
        inputs.model,
        test.at(indexes),
        scores.predicted[indexes],
        image_size=config["image_size"],
        resize=config["resize"],
        threads=inputs.compute.threads,
    )
    neighbours = {
        int(index): [Neighbour(train.key[i], classes[train.label[i]], jpeg_thumbnail(train.jpeg(int(i)))) for i in near]
        for index, near in zip(inputs.chosen.mistakes, inputs.training.nearest, strict=True)
    }
    return {
        index: GalleryPicture(
            test.key[index],
            classes[test.label[index]],
            classes[scores.predicted[index]],
            float(scores.confidence[index]),
            thumbnail(seen),
            thumbnail(heat),
            neighbours.get(index, ()),
        )
        for index, (seen, heat) in zip(indexes.tolist(), images, strict=True)
    }
