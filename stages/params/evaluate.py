"""The section `evaluate`: what is computed on the test images."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from stages.runtime.params_file import Section

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""Those that can be asked for; stages/evaluation/evaluators/corruptions.py makes them."""


class Robustness(Section):
    """How the fine-tuned model bears spoilt, attacked and slightly moved images (docs/robustness.md)."""

    images: Annotated[int, Field(ge=1)] = 60
    """Of test, at most; as many of each class as can be."""
    corruptions: list[str] = Field(default_factory=lambda: list(CORRUPTIONS))
    """Names, or `all`."""
    severities: Annotated[int, Field(ge=1, le=5)] = 5
    """Each corruption in severities 1 to this."""
    epsilons: list[Annotated[float, Field(gt=0, le=255)]] = Field(default_factory=lambda: [1.0, 4.0])
    """The most by which an attack changes a pixel, of 255. None: no attacks."""
    pgd_steps: Annotated[int, Field(ge=1)] = 20

    @field_validator("corruptions", mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return list(CORRUPTIONS) if value == "all" else value

    @field_validator("corruptions")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if unknown := [name for name in names if name not in CORRUPTIONS]:
            raise ValueError(f"no corruption is called {', '.join(unknown)} (known: all, {', '.join(CORRUPTIONS)})")
        return names

    @field_validator("corruptions", "epsilons")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        # By three digits or so, as figures are named after them.
        if len({each if isinstance(each, str) else f"{each:g}" for each in values}) < len(values):
            raise ValueError("each may be there once only")
        return values


class Evaluate(Section):
    """Changing these reruns evaluate and register only."""

    batch_size: Annotated[int, Field(ge=1)] = 128
    calibration_bins: Annotated[int, Field(ge=2)] = 15
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of every interval."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the intervals that have no closed form."""
    gallery: Annotated[int, Field(ge=0)] = 200
    """Test images, at most, that the report shows with what spoke for the answer."""
    seed: Annotated[int, Field(ge=0)] = 1
    robustness: Robustness | None = Field(default_factory=Robustness)
    """Null: not measured."""
