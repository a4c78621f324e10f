"""The section `evaluate`: what is computed on the test images."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from stages.runtime.params_file import Count, Section, Seed

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""All that `corruptions` may name; stages/evaluation/evaluators/corruptions.py makes them."""


class Robustness(Section):
    """How the fine-tuned model does on corrupted, attacked and slightly moved images (docs/robustness.md)."""

    images: Count = 60
    """Maximum number of test images, as evenly over classes as possible."""
    corruptions: list[str] = Field(default_factory=lambda: list(CORRUPTIONS))
    """Names, or `all`."""
    severities: Annotated[int, Field(ge=1, le=5)] = 5
    """Each corruption is applied at severities 1 to this."""
    epsilons: list[Annotated[float, Field(gt=0, le=255)]] = Field(default_factory=lambda: [1.0, 4.0])
    """Maximum change of a pixel by an attack, of 255; an empty list: no attacks."""
    pgd_steps: Count = 20

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
        # Compared as printed: figures are named after them.
        if len({each if isinstance(each, str) else f"{each:g}" for each in values}) < len(values):
            raise ValueError("each may be there once only")
        return values


class Evaluate(Section):
    """Changing these reruns evaluate and register only."""

    batch_size: Count = 128
    calibration_bins: Annotated[int, Field(ge=2)] = 15
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of every interval."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples for intervals without a closed form."""
    gallery: Annotated[int, Field(ge=0)] = 200
    """Maximum number of test images that the report shows, with class activation maps."""
    seed: Seed = 1
    robustness: Robustness | None = Field(default_factory=Robustness)
    """Null: not measured."""
