"""`python -m pipelines.housekeeping` (`make gc`): frees DVC's cache of what nothing names any more.

What branches, tags and the workspaces of all worktrees name stays, and so does what registered versions of all models
name.
"""

import argparse

from pipelines import environment
from pipelines.environment import ROOT
from pipelines.maintenance.cache import collect
from pipelines.maintenance.version_tags import tag_versions
from pipelines.processes.flow_lock import exclusive
from pipelines.retrain.worktree import check_root
from stages.params.register import Register
from stages.registry.client import reachable
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def main() -> None:
    """Tags versions, collects, and prints what was freed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry", action="store_true", help="only say what would go (versions get their tags all the same)"
    )
    own_cache = "the cache lies outside this checkout, and no other clone uses it: collect all the same"
    parser.add_argument("--cache-of-our-own", action="store_true", help=own_cache)
    arguments = parser.parse_args()
    environment.apply()
    name = load_section("register", Register).name
    check_root(ROOT)
    # Neither may be at work: what they have made and not committed yet, nothing names.
    with exclusive("retrain"), exclusive("verify"):
        with reachable():
            tags = tag_versions(name)
        print(f"kept for registered versions: {', '.join(tags) or 'nothing, there are none'}")
        print(collect(dry=arguments.dry, own_cache=arguments.cache_of_our_own))


if __name__ == "__main__":
    run(main)
