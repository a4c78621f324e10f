"""Does the evaluation find what was planted? A class that is known by day alone, and wrong labels, on real images.

Of one class of `imagenette-dev` training and test see the brighter half; a later delivery brings the darker half, made
darker still, with images of the other classes as they are. Besides, 3 % of the training images have a wrong label. The
pipeline trains on that as on anything; then the slice should be named first, and wrong labels come first among the
suspects. Trains for about ten minutes on two idle cores.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from bench.rounds import ROOT, machine
from stages.runtime.params_file import read_params
from tests.workspace import Workspace

NOISE = 0.03
DARKER = 0.15
DELIVERED = 60
"""Images of each other class in the later delivery."""
LOOKED_AT = 100
FRESH = 0.999
"""Of the later delivery: none of it is to train on, or darkness itself becomes known."""


def main() -> int:
    """Plants, runs the pipeline, and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="imagenette-dev")
    parser.add_argument("--preset", type=Path, default=ROOT / "presets/imagenette-64px-adversarial.yaml")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, metavar="DIR", help="keeps reports/ there")
    options = parser.parse_args()
    here = machine()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        wrong, dark = _plant(options.images, work / "incoming")
        (work / "checkout").mkdir()
        workspace = Workspace(work / "checkout", SYNSET_INCOMING=str(work / "incoming"))
        workspace.write_params(_params(options.preset, options.epochs))
        ended = workspace.run("dvc", "repro", "--quiet", "evaluate")
        if ended.returncode:
            sys.exit(ended.stdout)
        reports = workspace.root / "reports"
        slices = pd.read_csv(reports / "plots/slices.csv")
        suspects = pd.read_csv(reports / "label_suspects.csv")
        if options.out:
            reports.rename(options.out)
    first = slices.iloc[0]
    print(f"{here['cpu']}, {here['cores']} cores\n")
    named = f"{first['attribute']} {first['value']}, {first['within']}"
    print(f"planted: {dark} known by day alone; named first: {named}")
    print(slices.head(5).to_string(index=False))
    found = suspects["key"].map(lambda key: Path(key).name in wrong)
    print(f"\n{found[:LOOKED_AT].sum()} of the first {LOOKED_AT} suspects have a planted label;")
    print(f"of {len(wrong)} planted {found.sum()} are among all {len(suspects)} suspects")
    return 0


def _plant(images: Path, incoming: Path) -> tuple[set[str], str]:
    """Writes two deliveries; the names of the files with a wrong label, and the class that is known by day alone."""
    rng = np.random.default_rng(1)
    classes = sorted(path.name for path in (images / "train").iterdir())
    wrong: set[str] = set()
    for index, category in enumerate(classes):
        for split in ("train", "val"):
            files = sorted((images / split / category).iterdir())
            if not index:
                light = np.array([np.asarray(Image.open(path).convert("L")).mean() for path in files])
                order = np.argsort(-light, kind="stable")
                bright, night = order[: len(files) // 2], order[len(files) // 2 :]
                for i in night if split == "train" else ():
                    _write(incoming / "second" / category / files[i].name, _darkened(files[i]))
                files = [files[i] for i in sorted(bright)]
            elif split == "train":
                for path in files[:DELIVERED]:
                    _write(incoming / "second" / category / path.name, path.read_bytes())
                files = files[DELIVERED:]
            for path in files:
                label = category
                if split == "train" and rng.random() < NOISE:
                    label = classes[(index + int(rng.integers(1, len(classes)))) % len(classes)]
                    wrong.add(path.name)
                _write(incoming / "first" / split / label / path.name, path.read_bytes())
    return wrong, classes[0]


def _darkened(path: Path) -> bytes:
    pixels = (DARKER * np.asarray(Image.open(path).convert("RGB"), np.float64)).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _params(preset: Path, epochs: int) -> dict[str, Any]:
    params: dict[str, Any] = read_params(preset)
    params["batches"] = {name: {"role": "finetune", "source": name} for name in ("first", "second")}
    params["split"] |= {"val_fraction": 0.0, "fresh_fraction": FRESH}
    params["model"]["stem"] = "half"
    params["finetune"] |= {"epochs": epochs, "adversarial": None, "monitor": "train_loss"}
    return params


if __name__ == "__main__":
    sys.exit(main())
