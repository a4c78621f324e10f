"""What a preset gives over seeds: the figure in its header, and how much of it is luck.

Every training is `stages.finetune --trial` with the preset and another `finetune.seed`, and where it pretrains
`pretrain.seed`; the split stays as it is. Prints top-1 on test a seed with the minutes that fine-tuning took, then the
mean and the standard deviation over seeds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from bench.prepared import Trials
from bench.rounds import machine
from stages.runtime.params_file import read_params


def main() -> int:
    """Trains once a seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, required=True, metavar="PRESET")
    parser.add_argument("--incoming", type=Path, default=Path(), metavar="DIR", help="holds the preset's sources")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    preset = read_params(options.params)
    here = machine()
    print(f"{here['cpu']}, {here['cores']} cores, {preset['training']['threads']} threads\n")
    print("| seed | top-1 | test images | minutes |\n|---:|---:|---:|---:|", flush=True)
    shares = []
    with tempfile.TemporaryDirectory() as work:
        trials = Trials(preset, options.incoming, Path(work) / "work")
        for seed in options.seeds:
            params = json.loads(json.dumps(preset))
            for section in ("pretrain", "finetune"):
                params[section]["seed"] = seed
            trials.prepare(params)
            start = time.perf_counter()
            trained = trials.trained(params)
            minutes = (time.perf_counter() - start) / 60
            hits, images = trials.hits(trained, params)
            shares.append(hits / images)
            print(f"| {seed} | {hits / images:.1%} | {images} | {minutes:.1f} |", flush=True)
    spread = f" ± {stdev(shares):.1%} (standard deviation of {len(shares)} seeds)" if len(shares) > 1 else ""
    print(f"\nmean {mean(shares):.1%}{spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
