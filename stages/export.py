"""Exports a registered version as one file that runs without this project: ONNX, or PyTorch's own pt2.

The model takes pixels: images (n, 3, S, S) uint8, RGB, 0..255, any number n, after decoding, resizing and cropping. It
normalises them itself and gives logits (n, classes) float32. Decoding is left outside because no two runtimes do it
alike; what to do before and after stands in model.<format>.json beside the file, and within it.

A file is only kept where, opened anew, it answers as the original does on the whole test split of the shards that are
here. Size and latency are measured for both. File, JSON and figures go to the run of the version, whose review.html
shows them.
"""

import argparse
from pathlib import Path

from stages.params.register import Register
from stages.runtime import layout
from stages.runtime.command import positive, run
from stages.runtime.params_file import load_section

FORMATS = ("onnx", "pt2")


def main() -> None:
    """Finds the version, exports it, and says what came of it."""
    arguments = _arguments()
    from stages.registry.exporting import export_version

    name = load_section("register", Register).name
    which = f"/{arguments.version}" if arguments.version else f"@{arguments.alias}" if arguments.alias else ""
    export_version(name, which, arguments.format, arguments.out, arguments.threads)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=positive, metavar="N", help="of `register.name`; default: the newest")
    which.add_argument("--alias", metavar="NAME", help="the version that has it: serving, champion, challenger")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {layout.EXPORTS}/NAME/N, which git ignores")
    parser.add_argument(
        "--threads", type=positive, default=1, help="of the CPU while latency is measured (%(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
