"""Sections of params.yaml as typed, closed models; a mistake raises one message that names the key and the rule."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.runtime.command import StageError
from stages.runtime.yaml_text import parse_yaml

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A section of params.yaml: typed, closed (unknown keys are errors) and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class ParamsError(StageError):
    """params.yaml is wrong; the message says where and what is expected."""


def params_path() -> Path:
    """params.yaml of the working directory, or the file that SYNSET_PARAMS names (a trial of a search)."""
    return Path(os.environ.get("SYNSET_PARAMS", "params.yaml"))


def read_params(path: Path | None = None) -> dict[str, Any]:
    """The whole file as plain values.

    Raises:
        ParamsError: no such file, not YAML of one meaning, or not a mapping of sections.
    """
    path = path or params_path()
    try:
        values = parse_params(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run this from the repository root") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} cannot be read as text in UTF-8: {error}") from None
    return values


def parse_params(text: str, where: str) -> dict[str, Any]:
    """The values of the text of a params.yaml, wherever it comes from.

    Raises:
        ParamsError: it is not YAML of one meaning (stages/runtime/yaml_text.py), or not a mapping of sections.
    """
    try:
        values = parse_yaml(text, where)
    except StageError as error:
        raise ParamsError(str(error)) from None
    if not isinstance(values, dict):
        raise ParamsError(f"{where}: expected sections (batches, split, ...), found {type(values).__name__}")
    return values


def load_section(name: str, model: type[S], path: Path | None = None) -> S:
    """One section, checked. A dotted name (`shard.pretrain`) reaches into a section.

    Raises:
        ParamsError: the section is missing, or a key in it is unknown, of a wrong type or of a bad value.
    """
    return check_section(name, read_params(path), model, path)


def check_section(name: str, values: Any, model: type[S], path: Path | None = None) -> S:
    """One section of the whole file's `values`, as `load_section`."""
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            raise ParamsError(f"{path or params_path()}: the section `{name}` is missing")
        values = values[part]
    return check(name, values, model, path)


def check(name: str, values: Any, model: type[S], path: Path | None = None) -> S:
    """`values` as a `model`; messages call them `name`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(name, detail, model) for detail in error.errors()]
        raise ParamsError(f"{path or params_path()}: " + "; ".join(lines)) from None


def _explain(name: str, detail: Any, model: type[BaseModel]) -> str:
    key = ".".join([name, *(str(part) for part in detail["loc"])])
    if detail["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields) if len(detail["loc"]) == 1 else ""
        return f"unknown key `{key}`" + (f" (known: {known})" if known else "")
    if detail["type"] == "missing":
        return f"`{key}` is missing"
    if detail["type"] == "model_type":
        return f"`{key}`: should be keys with their values, or left out, got {detail['input']!r}"
    if detail["type"] in ("int_type", "float_type") and (number := _meant(detail["input"])) is not None:
        return f"`{key}`: should be a number that YAML reads as such, got {detail['input']!r}; write {number}"
    message = detail["msg"].removeprefix("Value error, ")
    # A rule over several keys names them; printing the whole section would hide that.
    found = "" if isinstance(detail["input"], dict) else f", got {detail['input']!r}"
    if detail["type"].startswith("less_than") and 1 in (detail["ctx"].get("le"), detail["ctx"].get("lt")):
        found += f"; a share: {detail['input']:g} % is {detail['input'] / 100:g}"
    return f"`{key}`: {message[0].lower() + message[1:]}{found}"


def _meant(value: Any) -> int | float | None:
    """The number that somebody wrote as text (`"0.1"`, `.1e3`), or as a fraction where it must be whole (`1e3`)."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return None
    if not math.isfinite(number) or (isinstance(value, float) and not number.is_integer()):
        return None
    return int(number) if number.is_integer() else number
