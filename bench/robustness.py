"""What adversarial training gives: top-1 under PGD, and on images as they are, beside the same recipe without it.

`--params` is a preset whose section `finetune` has `adversarial`. Both trainings are `stages.finetune --trial`; attacks
see all of test, with the preset's epsilon and `--steps` steps from a random start. Prints a table in Markdown, with
95 % intervals (Wilson).
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.prepared import Trials
from bench.rounds import machine
from stages.params.training.recipe import Adversarial
from stages.runtime.params_file import read_params


def main() -> int:
    """Trains twice and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, required=True, metavar="PRESET")
    parser.add_argument("--incoming", type=Path, default=Path(), metavar="DIR", help="holds the preset's sources")
    parser.add_argument("--steps", type=int, default=20, help="of PGD")
    options = parser.parse_args()
    params = read_params(options.params)
    if not params["finetune"].get("adversarial"):
        parser.error(f"{options.params}: the section finetune has no `adversarial`")
    plain = without_attacks(params)
    here = machine()
    attack = Adversarial(**params["finetune"]["adversarial"])
    looked_at = Adversarial(epsilon=attack.epsilon, val_steps=options.steps)
    print(f"{here['cpu']}, {here['cores']} cores\n")
    print(f"| training | top-1 | top-1 under PGD-{options.steps}, epsilon {attack.epsilon:g} of 255 |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        trials = Trials(params, options.incoming, Path(work) / "work")
        for name, each in (("standard", plain), (attack.method, params)):
            trained = trials.trained(each)
            print(f"| {name} | {' | '.join(_figures(trained, trials, params, looked_at))} |", flush=True)
    return 0


def without_attacks(params: dict[str, Any]) -> dict[str, Any]:
    """The same training on images as they are."""
    # No robust top-1 is measured that could be watched.
    return params | {"finetune": params["finetune"] | {"adversarial": None, "monitor": "val_loss"}}


def _figures(trained: Path, trials: Trials, params: dict[str, Any], attack: Adversarial) -> list[str]:
    """Clean and robust top-1 on test, on all of its images."""
    from stages.evaluation.statistics.intervals import wilson
    from stages.params.training.training import Training
    from stages.training.loop.objectives import ValidationView, robust_top1, supervised_metrics
    from stages.training.networks.devices import set_up
    from stages.training.networks.models import load_classifier

    compute, test = set_up(Training(**params["training"])), trials.test()
    model, config = load_classifier(trained)
    compute.place(model).eval()
    view = ValidationView(test, config["image_size"], config["resize"], batch_size=128)
    clean = supervised_metrics(model, view, compute)["val_top1"]
    robust = robust_top1(model, view, attack.model_copy(update={"val_images": len(test)}), compute)
    shown = []
    for share in (clean, robust):
        low, high = wilson(round(share * len(test)), len(test), 0.95)
        shown.append(f"{share:.1%} ({float(low):.1%} to {float(high):.1%})")
    return shown


if __name__ == "__main__":
    sys.exit(main())
