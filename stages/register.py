"""Stage `register`: models/finetuned -> a version in MLflow's registry, and the receipt models/registered.json.

A model whose sha256 is registered already ends as `unchanged`. Everything else that a registration makes can be made
again, and the tag `model.sha256` is the last that a version gets. So one that died midway leaves no more than a version
without that tag (it has `registering` instead), which the next run removes before it starts from the beginning.

Within retraining (SYNSET_UNFINISHED=retrain) the commit of the model is still to come: the version has neither alias
nor commit, and is tagged `unfinished` until retraining names its commit.
"""

import argparse
import logging

from stages.params.evaluate import Evaluate
from stages.params.gate import Gate
from stages.params.register import Register
from stages.registry.client import enabled, reachable
from stages.runtime import layout
from stages.runtime.command import run
from stages.runtime.files import sha256, write_json
from stages.runtime.params_file import load_section

logger = logging.getLogger(__name__)


def main() -> None:
    """Registers models/finetuned unless it is registered, and writes the receipt."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    name = load_section("register", Register).name
    gate = load_section("gate", Gate)
    confidence = load_section("evaluate", Evaluate).confidence
    weights = sha256(layout.FINETUNED / layout.WEIGHTS)
    if enabled():
        from stages.registry.registering import register_once

        with reachable():
            register_once(name, weights, gate, confidence)
    else:
        logger.warning("warning: SYNSET_TRACKING=off, so nothing is registered; later: `dvc repro -f -s register`")
    write_json(layout.RECEIPT, {"name": name, "sha256": weights})


if __name__ == "__main__":
    run(main)
