"""All of params.yaml at once: `python -m stages.params.all` checks it before DVC reads it."""

from pathlib import Path

from stages.command import run
from stages.params.batches import load_batches
from stages.params.evaluate import Evaluate
from stages.params.finetune import Finetune
from stages.params.gate import Gate
from stages.params.load import ParamsError, Section, load_section, params_path, read_params
from stages.params.model import Model
from stages.params.pretrain import Pretrain
from stages.params.register import Register
from stages.params.shard import Shard
from stages.params.split import Split
from stages.params.training import Training
from stages.params.validate import Validate


class Shards(Section):
    """A section of `shard` per role."""

    pretrain: Shard
    finetune: Shard


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
}


def check_all(path: Path | None = None) -> None:
    """Checks every section and that there are no others.

    Raises:
        ParamsError: naming the first key that is wrong, and the rule.
    """
    unknown = set(read_params(path)) - set(SECTIONS) - {"batches"}
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise ParamsError(f"{path or params_path()}: unknown section {names} (known: batches, {', '.join(SECTIONS)})")
    load_batches(path)
    for name, model in SECTIONS.items():
        load_section(name, model, path)


if __name__ == "__main__":
    run(check_all)
