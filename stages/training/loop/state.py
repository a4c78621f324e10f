"""What one training is made of, and the state that its steps change."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.params.training.recipe import Recipe
from stages.training.loop.objectives import Metrics, Objective
from stages.training.loop.optimisation import Ema, optimiser, schedule
from stages.training.loop.train_batches import Feed
from stages.training.networks.devices import Compute
from stages.training.networks.layer_groups import Groups
from stages.training.networks.models import Classifier

PLAIN = ("epoch", "step", "loss", "correct", "curve", "best")
"""Fields of `State` that a checkpoint holds as they are."""


@dataclass(frozen=True)
class Setup:
    """One training: the network, what it learns from, and how."""

    name: str
    """For log lines and messages."""
    model: Classifier
    groups: Groups
    feed: Feed
    objective: Objective
    recipe: Recipe
    image_size: int
    """Side of the crops in pixels, once progressive resizing is over."""
    compute: Compute

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-self.feed.images // self.recipe.batch_size)


@dataclass
class State:
    """Everything that the next step depends on, and what the curves need; a checkpoint is this."""

    model: Classifier
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: Ema | None
    objective: Objective
    epoch: int = 1
    step: int = 0
    """Steps done of this epoch."""
    loss: float = 0.0
    """Summed over this epoch's images, of all processes."""
    correct: float = 0.0
    curve: list[Metrics] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    """The network's weights of the best epoch, where the recipe has early stopping."""

    @property
    def eval_model(self) -> Classifier:
        """The model that is validated and saved: the moving average of the weights, or the weights themselves."""
        return self.ema.model if self.ema else self.model

    @property
    def steps_done(self) -> int:
        """Steps of all epochs."""
        return self.schedule.last_epoch  # torch's word for the number of its steps

    def parts(self) -> dict[str, Any]:
        """What has a state of its own, by name."""
        parts = {name: getattr(self, name) for name in ("optimiser", "schedule", "scaler", "ema", "objective")}
        return {"model": self.model.net} | {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        plain = {name: getattr(self, name) for name in PLAIN}
        return plain | {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for name in PLAIN:
            setattr(self, name, state[name])


def initial_state(setup: Setup) -> State:
    """The state before the first step."""
    model, recipe, compute = setup.model, setup.recipe, setup.compute
    chosen = optimiser(setup.groups, recipe, compute.dtype, model)
    return State(
        model=model,
        optimiser=chosen,
        schedule=schedule(chosen, recipe, setup.steps_per_epoch),
        scaler=torch.amp.GradScaler(compute.device, enabled=compute.dtype == torch.float16),
        ema=Ema(model, recipe.ema) if recipe.ema else None,
        objective=setup.objective,
    )
