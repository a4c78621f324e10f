"""`python -m pipelines.retrain`: the flow, once, now."""

from pipelines.retrain.flow import main
from stages.runtime.command import run

if __name__ == "__main__":
    run(main)
