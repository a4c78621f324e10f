"""Environments of the peers under `.synset/bench/`, apart from the project's: `python -m bench.environment` makes them.

`bench/requirements.txt` is one, `bench/requirements-ffcv.txt` the other: FFCV is compiled here, and wants older
packages. A bench makes the one that it needs on first use.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.rounds import ROOT, PeerError

REQUIREMENTS = {"bench": "requirements.txt", "ffcv": "requirements-ffcv.txt"}


def python(name: str) -> Path:
    """The interpreter of an environment, made if it is not there or its requirements changed.

    Raises:
        PeerError: it cannot be made here, with the last words of what failed.
    """
    wanted = ROOT / "bench" / REQUIREMENTS[name]
    folder = ROOT / ".synset/bench" / name
    interpreter, made_from = folder / "bin/python", folder / "requirements.txt"
    if made_from.is_file() and made_from.read_bytes() == wanted.read_bytes():
        return interpreter
    print(f"making the environment of {wanted.relative_to(ROOT)} in {folder.relative_to(ROOT)}", flush=True)
    _run(_uv(), "venv", "--quiet", "--clear", "--no-project", "--python", sys.executable, str(folder))
    install = [_uv(), "pip", "install", "--quiet", "--python", str(interpreter)]
    # Packages that are compiled here need those of the lines marked so, which a build of its own would not see.
    first = re.findall(r"^(\S+==\S+).*# first$", wanted.read_text(encoding="utf-8"), re.MULTILINE)
    if first:
        _run(*install, *first)
    _run(*install, *(["--no-build-isolation"] if first else []), "--requirements", str(wanted))
    shutil.copyfile(wanted, made_from)
    return interpreter


def _uv() -> str:
    own = ROOT / ".synset/uv/bin/uv"
    found = shutil.which("uv") or (str(own) if own.is_file() else None)
    if not found:
        raise PeerError("no uv here to make the peers' environment: run `make setup` first")
    return found


def _run(*command: str) -> None:
    environment = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    done = subprocess.run(command, env=environment, text=True, check=False, capture_output=True)
    if done.returncode:
        words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise PeerError(f"`{' '.join(command[1:4])}` ended with {done.returncode}:\n{words}")


def main() -> int:
    """Makes all of them; 1 where one failed, with the reason."""
    failed = 0
    for name in REQUIREMENTS:
        try:
            print(python(name))
        except PeerError as error:
            print(f"bench/{REQUIREMENTS[name]}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
