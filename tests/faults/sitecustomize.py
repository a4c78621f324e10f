"""A fault of the machine at a chosen moment: `SYNSET_FAULT="kill PROGRAM EVENT TEXT COUNT"`; also `full` and `hold`.

Python imports this module at its start where its folder is on PYTHONPATH. EVENT is an audit event
(https://docs.python.org/3/library/audit_events.html), raised right before the thing is done: `os.rename` by every
rename and replace, `subprocess.Popen` by every start of a program, `open` by every file opened. In the COUNTth in whose
arguments TEXT occurs, in a process in whose command line PROGRAM occurs, the process is killed as by kill -9, or told
that the disk is full, or held still until a test gives the lock of the file $SYNSET_HOLD back.
"""

import errno
import fcntl
import os
import signal
import sys
from typing import Any

_FAULT, _PROGRAM, _EVENT, _TEXT, _COUNT = (*os.environ.get("SYNSET_FAULT", "").split(" "), "", "", "", "", "")[:5]
_seen = 0


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    global _seen
    if event != _EVENT or _TEXT not in str(arguments) or _PROGRAM not in " ".join(sys.orig_argv):
        return
    if ".pyc" in str(arguments):  # Python's own, of code in stages/data/shards, and it does without
        return
    _seen += 1
    if _seen != int(_COUNT):
        return
    print(f"fault: {_FAULT} at {event} of {_TEXT}", file=sys.stderr, flush=True)
    if _FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if _FAULT == "hold":
        held = os.environ["SYNSET_HOLD"]
        os.close(os.open(f"{held}.{os.getpid()}", os.O_CREAT | os.O_WRONLY))  # tells the test that it stands still
        descriptor = os.open(held, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.close(descriptor)
        return
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if "SYNSET_NAMELESS" in os.environ:  # a machine whose own name no resolver knows, as in many a container
    import socket

    socket.gethostname = lambda: "nameless.invalid"

if _FAULT:
    sys.addaudithook(_watch)
