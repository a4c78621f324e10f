"""What a source holds, as one digest. `python -m stages.data.sources.digests SOURCE` prints it;
`--raw`: of what was ingested.

A batch that was delivered carries its digest in params.yaml, so that a source which was changed afterwards is known.
"""

import argparse
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from stages.data.raw.tars import members, raw_tars, read_at
from stages.data.sources.dispatch import Source, read_source
from stages.data.sources.parts import Image, Part
from stages.runtime import layout
from stages.runtime.command import StageError, run
from stages.runtime.progress import progress, worker_count

CHUNK = 2**20


def digest(contents: Iterable[tuple[str, str]]) -> str:
    """sha256 over the sorted lines `<split>/<class>/<name>`, NUL, sha256 of the content in hex."""
    lines = sorted(f"{path}\0{content}\n".encode() for path, content in contents)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def source_digest(source: str, incoming: Path | str) -> str:
    """The digest of all files that ingest would read of `source`.

    Raises:
        StageError: there is no such source, it holds no file, or one cannot be read.
    """
    read = read_source(source, incoming)
    with ThreadPoolExecutor(worker_count()) as pool:
        parts = pool.map(partial(_contents, read), read.parts)
        found = list(progress(parts, len(read.parts), f"digest of {source}"))
    if not any(found):
        raise StageError(f"source {source} holds no file")
    return digest(each for part in found for each in part)


def raw_digest(folder: Path) -> str:
    """The digest of a batch's raw tars: that of the source which they were made from."""
    return digest(
        (member.path, hashlib.sha256(read_at(tar, member.offset, member.size)).hexdigest())
        for tar in raw_tars(folder)
        for member in members(tar, folder)
    )


def _contents(source: Source, part: Part) -> list[tuple[str, str]]:
    found = []
    for image in part.images():
        if not isinstance(image, Image) or not source.choice.takes(image):
            continue
        content = hashlib.sha256()
        while data := image.data.read(CHUNK):
            content.update(data)
        taken = source.as_taken(image)
        found.append((f"{taken.split}/{taken.class_name}/{taken.name}", content.hexdigest()))
    return found


def main() -> None:
    """Prints the digest of one source, or of the raw tars of one batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as in params.yaml; a relative path resolves against SYNSET_INCOMING")
    parser.add_argument("--raw", action="store_true", help="the source is a folder of raw tars, data/raw/ROLE/BATCH")
    given = parser.parse_args()
    print(raw_digest(Path(given.source)) if given.raw else source_digest(given.source, layout.incoming()))


if __name__ == "__main__":
    run(main)
