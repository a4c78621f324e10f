"""The command line: how a command ends, and what it sets before anything heavy is imported."""

import os
import subprocess
import sys

from tests.closure import ROOT


def command(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`run(main)` in a process of its own, where main is `code`."""
    bare = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | environment
    text = f"import os\nfrom stages.runtime.command import StageError, run\ndef main():\n    {code}\nrun(main)"
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=bare, capture_output=True, text=True, check=False)


def test_threads_of_torch_sleep_while_they_wait_unless_somebody_says_otherwise() -> None:
    show = "print(os.environ['OMP_WAIT_POLICY'])"
    assert command(show).stdout == "PASSIVE\n"
    assert command(show, OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE\n"


def test_an_error_for_a_person_is_one_message() -> None:
    ended = command("raise StageError('what, where, what to do')")
    assert (ended.returncode, ended.stderr) == (1, "error: what, where, what to do\n")
