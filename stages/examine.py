"""Examines a version of a registered model before it goes into force.

It is sound where its weights are those that were registered, and where it answers the images that were recorded with
it as it did then, in a process of its own. With --against, its verdict is checked too: one that was taken against
other weights than those of that version is taken again, from the recorded predictions of both. The version in force
predicts now for images that it has not seen, those of later deliveries, as far as their shards are at hand.

Ends with 0 whatever the result, and with 1 and a message where it could not examine.
"""

import argparse
from pathlib import Path

from stages.params.gate import Gate
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def main() -> None:
    """Examines, prints the result, and writes it."""
    arguments = _arguments()
    from stages.registry.examining import examine_version

    gate, checkouts = load_section("gate", Gate), [Path(), *arguments.data]
    result = examine_version(arguments.name, arguments.version, arguments.against, gate, checkouts)
    if arguments.json:
        result.write(arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the registered model")
    parser.add_argument("version", help="its number")
    parser.add_argument("--against", default="", metavar="VERSION|none", help="the version in force, or none")
    more = "another checkout whose shards may be those of the version; may be repeated"
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="CHECKOUT", help=more)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
