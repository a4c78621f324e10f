"""All of params.yaml at once: `python -m stages.params.all` checks it before DVC reads it."""

from pathlib import Path
from typing import Any

from stages.params.batches import check_batches
from stages.params.evaluate import Evaluate
from stages.params.finetune import Finetune
from stages.params.gate import Gate
from stages.params.pretrain import Pretrain
from stages.params.reconcile import Reconcile
from stages.params.register import Register
from stages.params.retrain import Retrain
from stages.params.serve import Serve
from stages.params.shard import Shards
from stages.params.split import Split
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.params.tune import Tune
from stages.params.validate import Validate
from stages.runtime.command import run
from stages.runtime.params_file import ParamsError, Section, check_section, params_path, read_params

SECTIONS: dict[str, type[Section]] = {
    "split": Split,
    "validate": Validate,
    "shard": Shards,
    "model": Model,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "training": Training,
    "evaluate": Evaluate,
    "gate": Gate,
    "register": Register,
    "retrain": Retrain,
    "reconcile": Reconcile,
    "tune": Tune,
    "serve": Serve,
}


def check_all(path: Path | None = None) -> None:
    """Checks every section and that there are no others.

    Raises:
        ParamsError: naming the first key that is wrong, and the rule.
    """
    values = read_params(path)
    unknown = set(values) - set(SECTIONS) - {"batches"}
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise ParamsError(f"{path or params_path()}: unknown section {names} (known: batches, {', '.join(SECTIONS)})")
    batches = check_batches(values.get("batches"), path)
    sections = {name: check_section(name, values, model, path) for name, model in SECTIONS.items()}
    _check_together(sections, {batch.role for batch in batches.values()}, path or params_path())


def _check_together(sections: dict[str, Any], roles: set[str], where: Path) -> None:
    """Rules over several sections, checked before hours of training."""
    if "finetune" not in roles:
        raise ParamsError(f"{where}: `batches` has none of the role finetune, so there is no target to train for")
    method = sections["pretrain"].method
    if method != "none" and "pretrain" not in roles:
        raise ParamsError(f"{where}: `pretrain.method` is {method}, but no batch has the role pretrain; set it to none")
    size = sections["model"].image_size
    for role in ("finetune",) if method == "none" else ("pretrain", "finetune"):
        resize = getattr(sections["shard"], role).resize
        for name, wanted in (("model.image_size", size), (f"{role}.end_size", sections[role].end_size)):
            if wanted and resize < wanted:
                raise ParamsError(f"{where}: `shard.{role}.resize` is {resize}, smaller than `{name}` ({wanted})")
        start = sections[role].start_size
        if start and start > (sections[role].end_size or size):
            raise ParamsError(f"{where}: `{role}.start_size` is {start}, more than the size that training ends at")


if __name__ == "__main__":
    run(check_all)
