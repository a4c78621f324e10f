"""Every tag and alias in MLflow that the project sets or reads, and who sets it when.

They are a contract with people, who set some of them by hand, and with versions registered by older code: a name here
never changes. Training code may not import the registry, so it repeats FINGERPRINT, MACHINE, TRIAL and MODEL_SHA256.
"""

# Aliases of versions
CHALLENGER = "challenger"
"""The newest candidate. Set by register; by retrain once the commit exists, which also removes it if a batch of the
version is retracted."""
CHAMPION = "champion"
"""The version that a person wants in force. Set by a person; set back by reconcile when it refuses."""
SERVING = "serving"
"""The version in force. Set by reconcile only, at a promotion."""
PREVIOUS = "previous"
"""The version in force before. Set by reconcile, at a promotion."""
IN_FORCE = (SERVING, CHAMPION)
"""A version in force has one of these; where both exist, SERVING decides."""

# Tags of runs
STAGE = "stage"
"""pretrain, finetune or tune. Set when a run begins."""
FINGERPRINT = "fingerprint"
"""Identity of a training (code, params, data), by which a resumed one finds its run. Set when a run begins."""
PARENT_RUN = "mlflow.parentRunId"
"""MLflow's own: the search that a trial belongs to. Set when a trial's run begins."""
STUDY = "study"
"""Name of the search. Set by tune on the search's run."""
ROLE = "role"
"""`search`. Set by tune on the search's run."""
TRIAL = "trial"
"""Name of the trial. Set by finetune on the run of a trial."""
RUN_SOURCE = "source"
"""Set by register on a run that it made from stored files, because the model was trained elsewhere."""

# Tags of runs and versions
MODEL_SHA256 = "model.sha256"
"""sha256 of the weights, by which runs and versions of a model are found: an id would differ on every server. Set on a
run when training ends; on a version by register, as the last tag. A version without it is not registered."""
COMMIT = "git.commit"
"""Set when a run begins; on a version by register, or by retrain when the commit exists."""
DIRTY = "git.dirty"
"""`true` where the working tree differed from COMMIT. Set with it."""
MACHINE = "machine"
"""Kind of processor and precision, within which weights are equal to the bit. Set when a run begins, copied to the
version by register."""

# Tags of versions
REGISTERING = "registering"
"""sha256 of the weights while register is at work; a version that keeps it was interrupted. Set and removed by
register."""
UNFINISHED = "unfinished"
"""Registered within a retraining that has not committed yet; nobody may promote it. Set by register, removed by
retrain."""
DATA_FINGERPRINT = "data.fingerprint"
"""sha256 over all shard sets of the training. Set by register."""
LATENCY = "latency.median_ms"
"""Median time of one image on one CPU thread. Set by register."""
LATENCY_P95 = "latency.p95_ms"
"""95th percentile of the same. Set by register."""
GATE = "gate"
"""The verdict: passed, failed or inconclusive. Set by register, and by examine when the gate is taken again."""
TEST_SET = "test.set"
"""Digest of the test images that the verdict rests on. Set with GATE."""
DECISION = "gate.decision"
"""This verdict was the n-th decision taken on its test set. Set with GATE."""
GATE_AGAINST = "gate.in_force"
"""sha256 of the weights that the verdict was taken against, or NO_VERSION. Set with GATE, as the last of the four:
without it no verdict holds."""
NO_VERSION = "none"
"""Value of GATE_AGAINST: no version was in force, and the floors decided alone."""
EXPORT = "export.{format}"
"""sha256 of the exported file. Set by export."""
VERIFY = "verify"
"""Result and day of the last verification. Set by verify."""
VERIFY_DETAIL = "verify.detail"
"""Its findings in words. Set by verify."""
RETRACTED = "retracted"
"""Batches that the version was trained on and that were retracted later. Set by retrain."""
OVERRIDE = "override"
"""The reason why a version may be promoted although its gate did not pass. Set by a person."""
APPROVED_BY = "approved_by"
"""Who approves the promotion. Set by a person."""
PROMOTING = "promoting"
"""Journal of a promotion as JSON, while it lasts. Set and removed by reconcile."""
PROMOTED = "promoted"
"""When the version last came into force, UTC. Set by reconcile."""
REFUSED = "promotion.refused"
"""When and why a promotion was refused. Set by reconcile, removed when the version is promoted."""

# Tags of registered models
DECISIONS = "gate.decisions.{test_set}"
"""How many decisions a test set has taken: versions may be deleted. Set with GATE."""
