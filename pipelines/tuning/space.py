"""The space that is searched: params.yaml with other values at dotted keys, checked before any trial runs."""

import json
from collections.abc import Mapping
from typing import Any

from stages.params.finetune import Finetune
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.params.tune import Distribution, Tune
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.fingerprint import dependencies_of
from stages.runtime.params_file import ParamsError, check


def check_space(params: dict[str, Any], space: Mapping[str, Distribution]) -> None:
    """Tries both ends of each key, or each choice.

    Raises:
        ParamsError: there is no such key, or it may not have this value.
    """
    for key, values in space.items():
        ends = values.choices if values.choices is not None else [values.low, values.high]
        for value in ends:
            recipe_of(with_values(params, {key: value}))


def check_metric(params: dict[str, Any], tune: Tune) -> None:
    """Raises StageError where trials would not measure `tune.metric`."""
    paths = [path for path in dependencies_of("finetune") if path.name == "index.json"]
    indexes = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not indexes:
        raise StageError(f"{layout.SHARDS}/finetune holds no shard set; `dvc repro pretrain shard` makes it")
    if not any(index["splits"].get("val", {}).get("count") for index in indexes):
        raise StageError(
            f"`tune.metric` is {tune.metric}, but val has no images; set `split.val_fraction` above 0, and "
            "`dvc repro pretrain shard`"
        )
    searched = any(key.startswith("finetune.adversarial") for key in tune.space)
    if tune.metric == "val_robust_top1" and not params["finetune"].get("adversarial") and not searched:
        raise ParamsError("`tune.metric` is val_robust_top1, which is measured where `finetune.adversarial` is set")


def recipe_of(params: dict[str, Any]) -> Finetune:
    """The section `finetune`; raises ParamsError unless all sections that may be searched are valid."""
    check("model", params["model"], Model)
    check("training", params["training"], Training)
    return check("finetune", params["finetune"], Finetune)


def with_values(params: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the whole of params.yaml with other values at dotted keys."""
    changed = json.loads(json.dumps(params))
    put(changed, values)
    return changed


def put(params: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Writes values at dotted keys into `params`."""
    for key, value in values.items():
        *path, last = key.split(".")
        section = params
        for part in path:
            if section.get(part) is None:  # `adversarial: null`
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ParamsError(f"`tune.space`: `{key}` cannot be searched: `{part}` has no keys, it is {section!r}")
        section[last] = value
