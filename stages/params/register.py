"""The section `register`: the model's name in the MLflow registry."""

import re
from typing import Annotated

from pydantic import AfterValidator

from stages.runtime.params_file import Section

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


def _fits_a_git_tag(name: str) -> str:
    """`make gc` keeps versions by git tags `model/<name>/<number>`."""
    if not _NAME.fullmatch(name) or name.endswith(".lock"):
        raise ValueError("expected letters, digits, `-`, `_` and single dots between them, and no `.lock` at the end")
    return name


class Register(Section):
    """One name per product; MLflow counts its versions."""

    name: Annotated[str, AfterValidator(_fits_a_git_tag)]
