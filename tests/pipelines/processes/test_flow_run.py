"""What a stage's output says of it."""

from pipelines.processes.flow_run import last_error, what_ran


def test_a_second_repro_in_the_same_checkout_is_named() -> None:
    said = ["ERROR: failed to reproduce 'scan': '/x' is busy, it is being blocked by:", "  (PID 7): dvc repro", ""]
    assert "another `dvc repro` is at work" in last_error(said)


def test_last_words_and_what_ran() -> None:
    traceback = [
        "Traceback ...",
        "ValueError: no",
        "ERROR: failed to reproduce 'scan': failed to run: x, exited with 1",
    ]
    assert last_error(traceback) == "ValueError: no"
    reasons = ["error: too much is quarantined:", "  one: 41 %", "  two: 12 %"]
    around = ["error: an earlier one", "working", *reasons, traceback[-1], "Having any troubles?"]
    assert last_error(around) == "too much is quarantined:\n  one: 41 %\n  two: 12 %"
    assert last_error([]) == "it ended without a word"
    assert what_ran(["Stage 'scan' didn't change, skipping"]) == "unchanged"
    assert what_ran(["Stage 'scan' is cached - skipping run, checking out outputs"]) == "restored"
    assert what_ran(["Running stage 'scan':"]) == "ran"
