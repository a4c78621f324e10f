"""What a source holds, as one digest: `python -m stages.data.digests SOURCE` prints it; `--raw`: what was ingested.

A batch that was delivered carries its digest in params.yaml, so that a source which was changed afterwards is known.
"""

import argparse
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.command import StageError, run
from stages.data.raw import members, raw_tars, read_at
from stages.data.sources import Group, read_source
from stages.progress import progress, worker_count


def digest(contents: Iterable[tuple[str, str]]) -> str:
    """sha256 over the sorted lines `<split>/<class>/<name>`, NUL, sha256 of the content in hex."""
    lines = sorted(f"{path}\0{content}\n".encode() for path, content in contents)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def source_digest(source: str, incoming: Path) -> str:
    """The digest of all files that ingest would read of `source`.

    Raises:
        StageError: there is no such source, it holds no file, or one cannot be read.
    """
    groups = list(read_source(source, incoming))
    with ThreadPoolExecutor(worker_count()) as pool:
        found = list(progress(pool.map(_contents, groups), len(groups), f"digest of {source}"))
    if not any(found):
        raise StageError(f"source {source} holds no file")
    return digest(each for group in found for each in group)


def raw_digest(folder: Path) -> str:
    """The digest of a batch's raw tars: that of the source which they were made from."""
    return digest(
        (member.path, hashlib.sha256(read_at(tar, member.offset, member.size)).hexdigest())
        for tar in raw_tars(folder)
        for member in members(tar, folder)
    )


def _contents(group: Group) -> list[tuple[str, str]]:
    found = []
    for each in group.files:
        with each.open() as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # any binary file does
        found.append((f"{group.split}/{group.class_name}/{each.name}", content))
    return found


def main() -> None:
    """Prints the digest of one source, or of the raw tars of one batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as in params.yaml; a relative path resolves against SYNSET_INCOMING")
    parser.add_argument("--raw", action="store_true", help="the source is a folder of raw tars, data/raw/ROLE/BATCH")
    given = parser.parse_args()
    incoming = Path(os.environ.get("SYNSET_INCOMING", "data/incoming"))
    print(raw_digest(Path(given.source)) if given.raw else source_digest(given.source, incoming))


if __name__ == "__main__":
    run(main)
