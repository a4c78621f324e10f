"""Data for measurements: shards that our own stages write, in a checkout of their own."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.rounds import ROOT
from stages.data.raw.facts import ACCEPTED
from stages.runtime.params_file import read_params
from stages.runtime.tables import read_table, write_table
from tests.workspace import Workspace

if TYPE_CHECKING:
    from stages.data.shards.loading.samples.index import Samples


def written_shards(images: Path, side: int, work: Path) -> Path:
    """A shard set of the images of a folder, written once below `work`; all that decode are accepted.

    Args:
        images: `CLASS/*`, all for training, or `train/CLASS/*` and `val/CLASS/*`.
        side: shorter side of the images in the shards, in pixels.

    Raises:
        SystemExit: a stage failed, with its words.
    """
    done = work / "checkout/data/shards/pretrain/all"
    if (done / "index.json").is_file():
        return done
    (work / "checkout").mkdir(parents=True)
    workspace = Workspace(work / "checkout", SYNSET_INCOMING=str(images.parent))
    params = read_params(ROOT / "params.yaml")
    params["batches"] = {"all": {"role": "pretrain", "source": images.name}}
    params["shard"]["pretrain"] |= {"resize": side, "quality": 90}
    workspace.write_params(params)
    for stage in ("ingest", "scan"):
        _run(workspace, stage)
    # Not by validate, which would find that images are repeated, and would make a split of its own.
    facts = read_table(workspace.root / "data/facts/pretrain/all.parquet")
    facts = facts[facts["decodes"]]
    labels = np.unique(facts["class_name"].to_numpy(dtype=object), return_inverse=True)[1]
    split = facts["source_split"].replace({"all": "train"})
    accepted = facts.assign(split=split, label=labels.astype(np.int32))
    write_table(accepted, ACCEPTED, workspace.root / "data/accepted/pretrain/all.parquet")
    _run(workspace, "shard")
    return done


class Trials:
    """A checkout in which `stages.finetune --trial` trains with one params file after the other.

    Args:
        incoming: holds the folders that the sources of `params` name.
        work: a new folder.
    """

    def __init__(self, params: dict[str, Any], incoming: Path, work: Path) -> None:
        self.incoming = work / "incoming"
        self.incoming.mkdir(parents=True)
        for source in (batch["source"] for batch in params["batches"].values()):
            if not source.startswith("sample:"):
                (self.incoming / source).symlink_to(incoming.resolve() / source)
        (work / "checkout").mkdir()
        self.workspace = Workspace(work / "checkout", SYNSET_INCOMING=str(self.incoming))

    def prepare(self, params: dict[str, Any]) -> None:
        """Brings the stages before fine-tuning up to date.

        Raises:
            SystemExit: a stage failed, with its words.
        """
        self.workspace.write_params(params)
        self._run("dvc", "repro", "--quiet", "pretrain")
        self._run("dvc", "repro", "--quiet", "shard")

    def trained(self, params: dict[str, Any]) -> Path:
        """Prepares and trains; the folder of the model.

        Raises:
            SystemExit: a stage failed, with its words.
        """
        self.prepare(params)
        trial = self.workspace.root / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        self._run(sys.executable, "-m", "stages.finetune", "--trial", str(trial))
        return trial / "model"

    def test(self) -> "Samples":
        """The target's test images."""
        from stages.data.shards.loading.samples.index import read_samples

        indexes = sorted((self.workspace.root / "data/shards/finetune").glob("*/index.json"))
        return read_samples([index.parent for index in indexes], "test")

    def hits(self, trained: Path, params: dict[str, Any]) -> tuple[int, int]:
        """How many test images the model in the folder `trained` recognises, and of how many."""
        from stages.evaluation.inference import ImageFormat, predict
        from stages.params.training.training import Training
        from stages.training.networks.devices import set_up
        from stages.training.networks.models import load_classifier

        compute, test = set_up(Training(**params["training"])), self.test()
        model, config = load_classifier(trained)
        compute.place(model).eval()
        image = ImageFormat(config["image_size"], config["resize"], batch_size=128)
        logits = predict(test, {"": model}, image, compute)[""].logits
        return int((logits.argmax(1) == np.asarray(test.label)).sum()), len(test)

    def _run(self, *command: str) -> None:
        ended = self.workspace.run(*command)
        if ended.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{ended.stdout}")


def _run(workspace: Workspace, stage: str) -> None:
    ended = workspace.run(sys.executable, "-m", f"stages.{stage}", "all")
    if ended.returncode:
        sys.exit(f"stages.{stage} failed:\n{ended.stdout}")
