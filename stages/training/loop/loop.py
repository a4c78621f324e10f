"""The loop: epochs of steps, a look at val after each, checkpoints, and the curves.

A step depends on the state before it and on (seed, epoch, step, process) alone: order, crops, dropout and mixing are
drawn anew from those. So a checkpoint holds no random state and no reader's, and training goes on from any step as if
nothing had happened.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stages.params.training.recipe import LOWER_IS_BETTER, Recipe
from stages.runtime.command import StageError
from stages.runtime.files import write_text
from stages.runtime.progress import progress
from stages.training.loop.checkpoints.file import load_checkpoint, save_checkpoint
from stages.training.loop.objectives import Metrics, Objective
from stages.training.loop.optimisation import Ema, optimiser, schedule
from stages.training.loop.processes import StopSignals, is_first, rank, share_buffers, summed, world_size
from stages.training.loop.train_batches import Feed
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier, take_weights
from stages.training.networks.regularisation import training_mode

logger = logging.getLogger(__name__)
CHECKPOINT_STEPS = "SYNSET_CHECKPOINT_STEPS"
"""Steps between two checkpoints. Not a parameter: it never changes bytes, so it must not make DVC run again."""
LOOK_AT_LOSS_EVERY = 50
"""Steps on a GPU: reading a loss back makes it wait."""
COMPILED_SHAPES = 256
"""At most: batches of two sizes, crops of some ten, in training, under attack and on val."""
SIZE_STEP = 8
"""Progressive resizing grows by so many pixels at least."""


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
    hits: float = 0.0
    curve: list[Metrics] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    """The network's weights of the best epoch, where early stopping asks for them."""

    @property
    def kept(self) -> Classifier:
        """The model that is validated and kept."""
        return self.ema.model if self.ema else self.model

    @property
    def steps_done(self) -> int:
        """Of all epochs."""
        return self.schedule.last_epoch  # torch's word for the number of its steps

    def parts(self) -> dict[str, Any]:
        """What has a state of its own, by name."""
        parts = {name: getattr(self, name) for name in ("optimiser", "schedule", "scaler", "ema", "objective")}
        return {"model": self.model.net} | {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        plain = {name: getattr(self, name) for name in ("epoch", "step", "loss", "hits", "curve", "best")}
        return plain | {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for name in ("epoch", "step", "loss", "hits", "curve", "best"):
            setattr(self, name, state[name])


def fit(
    model: Classifier,
    groups: list[tuple[list[nn.Parameter], float]],
    feed: Feed,
    objective: Objective,
    recipe: Recipe,
    image_size: int,
    compute: Compute,
    work: Path,
    on_epoch: Callable[[Metrics, int], None],
    name: str,
) -> list[Metrics]:
    """Trains `model` in place, leaves it in evaluation mode, and returns its curve, a dict an epoch.

    Args:
        groups: parameters to train with their peak learning rate.
        image_size: of the crops, in pixels, once progressive resizing is over.
        work: folder for the checkpoint, from which a later call goes on, and progress.jsonl, the curve so far.
        on_epoch: called in process 0 with the metrics of every epoch that ends here and its number (from 1).

    Raises:
        StageError: too few images, nothing to watch for early stopping, a loss that is not finite, or memory is full.
        SystemExit: SIGTERM or SIGINT came; a checkpoint was written.
    """
    _check(feed, objective, recipe, image_size, name)
    compute.place(model)
    state = _begin(model, groups, feed, objective, recipe, compute)
    _resume(state, work, compute, name)
    forward = _parallel(model, compute)
    with StopSignals() as signals, _explained(name):
        keeper = _Keeper(state, work, signals, name)
        while not _finished(state.curve, recipe):
            _epoch(state, forward, feed, recipe, image_size, compute, keeper, on_epoch)
        keeper.stop_if_asked()  # while the last epoch was written down
    final = state.best if state.best is not None else state.kept.net.state_dict()
    take_weights(model.net, final)
    model.eval()
    return state.curve


def steps_per_epoch(feed: Feed, recipe: Recipe) -> int:
    """Batches of an epoch."""
    return -(-feed.images // recipe.batch_size)


def size_in(epoch: int, recipe: Recipe, image_size: int) -> int:
    """Side of an epoch's crops in pixels: progressive resizing grows evenly (Howard 2018; Tan & Le 2021)."""
    end = recipe.end_size or image_size
    if recipe.start_size is None:
        return end
    growing = recipe.full_size_from * recipe.epochs
    share = min((epoch - 1) / growing, 1.0) if growing else 1.0
    grown = recipe.start_size + share * (end - recipe.start_size)
    return min(math.ceil(grown / SIZE_STEP) * SIZE_STEP, end)


def sizes(recipe: Recipe, image_size: int) -> dict[int, str]:
    """Sides in pixels of all images that the network is shown, and the keys of params.yaml that they are from."""
    crops = sorted({size_in(epoch, recipe, image_size) for epoch in range(1, recipe.epochs + 1)})
    return dict.fromkeys(crops, "`start_size` to `end_size`") | {image_size: "`model.image_size`"}


def _check(feed: Feed, objective: Objective, recipe: Recipe, image_size: int, name: str) -> None:
    if not feed.images:
        raise StageError(f"{name}: there is no training image that it could learn from")
    if recipe.batch_size > feed.images:
        raise StageError(
            f"{name}: `batch_size` is {recipe.batch_size}, but there are only {feed.images} training images; lower it"
        )
    smallest = feed.images // steps_per_epoch(feed, recipe)
    if smallest // world_size() // recipe.accumulate < 2:
        raise StageError(
            f"{name}: {world_size()} processes and `accumulate: {recipe.accumulate}` leave parts of fewer than 2 of "
            f"the {smallest} images of a batch; raise `batch_size` or lower `accumulate`"
        )
    if recipe.start_size and recipe.start_size > (recipe.end_size or image_size):
        raise StageError(
            f"{name}: `start_size` is {recipe.start_size}, more than `model.image_size` ({image_size}), which it is to "
            "grow to; lower it"
        )
    measured = ["train_loss", *(["train_top1"] if objective.recognises else []), *objective.watched]
    if recipe.patience and recipe.monitor not in measured:
        raise StageError(
            f"{name}: `patience` watches `{recipe.monitor}`, which is not measured here (only {', '.join(measured)}); "
            "set `patience` to null, choose another `monitor`, or raise `split.val_fraction` if val has no images"
        )


def _begin(
    model: Classifier, groups: list[tuple[list[nn.Parameter], float]], feed: Feed, objective: Objective, recipe: Recipe,
    compute: Compute,
) -> State:  # fmt: skip
    chosen = optimiser(groups, recipe, compute.dtype, model)
    return State(
        model=model,
        optimiser=chosen,
        schedule=schedule(chosen, recipe, steps_per_epoch(feed, recipe)),
        scaler=torch.amp.GradScaler(compute.device, enabled=compute.dtype == torch.float16),
        ema=Ema(model, recipe.ema) if recipe.ema else None,
        objective=objective,
    )


def _parallel(model: Classifier, compute: Compute) -> nn.Module:
    """The model as steps call it: compiled, its gradients averaged over all processes."""
    forward: nn.Module = model
    if world_size() > 1:
        # Else DDP would sort gradients anew after its first step, and add them up in another order than a process that
        # goes on from a checkpoint: of three numbers and more the sum is not the same to the last bit.
        forward = DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()] if compute.on_gpu else None, find_unused_parameters=True
        )
    if compute.compile:
        # One kernel a shape, whichever of an epoch's two batch sizes comes first after a checkpoint. Beyond the limit,
        # which is 8 by default, the rest would silently not be compiled, and other shapes after a checkpoint.
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES
        forward.compile(dynamic=False)
    return forward


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What parameters can mend, in words."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageError(
            f"{name}: the GPU's memory is full; lower `batch_size`, or raise `accumulate`, which computes each batch "
            f"in parts: {str(error).splitlines()[0]}"
        ) from error
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise StageError(
            f"{name}: this network has an operation that a GPU computes in one way today and in another tomorrow; set "
            f"`training.deterministic` to false, or choose another architecture: {str(error).split('. ')[0]}"
        ) from error


# --------------------------------------------------------------------------------------------- an epoch and its steps


def _epoch(
    state: State, forward: nn.Module, feed: Feed, recipe: Recipe, image_size: int, compute: Compute,
    keeper: "_Keeper", on_epoch: Callable[[Metrics, int], None],
) -> None:  # fmt: skip
    """What is left of the epoch that `state` is in, and the look at val after it."""
    began, done_before = time.monotonic(), state.step
    steps, size = steps_per_epoch(feed, recipe), size_in(state.epoch, recipe, image_size)
    if state.step < steps:
        _train(state, forward, feed, size, recipe, compute, keeper)
    rate = (steps - done_before) * feed.images / steps / (time.monotonic() - began)
    share_buffers(state.kept)
    state.kept.eval()
    metrics: Metrics = {"epoch": state.epoch, "lr": float(state.schedule.get_last_lr()[-1])}
    metrics["train_loss"] = state.loss / feed.images
    if state.objective.recognises:
        metrics["train_top1"] = state.hits / feed.images
    with keeper.saving_when_stopped():
        metrics |= state.objective.look(state.kept)
    _check_val(metrics, keeper.name)
    _end_epoch(state, metrics, recipe)
    keeper.write_progress()
    if _finished(state.curve, recipe):
        keeper.save()
    if is_first():
        memory = _peak_memory(compute)
        more = {"images_per_second": rate, "seconds": time.monotonic() - began, "peak_memory_mb": memory}
        on_epoch(metrics | more, len(state.curve))
        which = f"{keeper.name}: epoch {len(state.curve)} of {recipe.epochs}"
        logger.info("%s, %s, %.0f images/s", which, _describe(metrics), rate)


def _end_epoch(state: State, metrics: Metrics, recipe: Recipe) -> None:
    before = [each[recipe.monitor] for each in state.curve if recipe.monitor in each]
    state.curve.append(metrics)
    if recipe.patience and not any(recipe.better(each, metrics[recipe.monitor]) for each in before):
        state.best = {key: value.clone() for key, value in state.kept.net.state_dict().items()}
    state.epoch, state.step, state.loss, state.hits = state.epoch + 1, 0, 0.0, 0.0


def _train(
    state: State, forward: nn.Module, feed: Feed, size: int, recipe: Recipe, compute: Compute, keeper: "_Keeper"
) -> None:
    """The steps that are left of the epoch."""
    training_mode(state.model)
    steps = steps_per_epoch(feed, recipe)
    # Sums stay on the device: reading one back each step would make a GPU wait.
    sums = torch.tensor([state.loss, state.hits], dtype=torch.float64, device=compute.device)
    losses = _Losses(state, compute, keeper)
    batches = feed.batches(state.epoch, state.step, size)
    for images, labels in progress(batches, steps - state.step, f"{keeper.name}, epoch {state.epoch}"):
        _seed(recipe.seed, state.epoch, state.step)
        rate = float(state.schedule.get_last_lr()[-1])
        seen = _step(state, forward, images, labels, _batch_size(state, feed, steps), feed.views, recipe, compute)
        sums += summed(seen)
        losses.note(seen[0], rate)
        state.step += 1
        if keeper.due():
            losses.check()
            _check_weights(state, rate, keeper)
            state.loss, state.hits = sums.tolist()
            keeper.save()
            keeper.stop_if_asked()
    losses.check()
    _check_weights(state, rate, keeper)
    state.loss, state.hits = sums.tolist()


def _check_weights(state: State, rate: float, keeper: "_Keeper") -> None:
    """Stops before weights are kept that a step has broken whose own loss was finite."""
    values = [each for each in state.model.net.state_dict().values() if each.is_floating_point()]
    if not torch.stack([each.isfinite().all() for each in values]).all():
        raise StageError(
            f"{keeper.name}: weights are not finite after step {state.step} of epoch {state.epoch}, at a learning rate "
            f"of {rate:g}, and no loss would be; lower `lr`, lengthen `warmup`, or set `clip_norm`. "
            f"{keeper.last_good()}"
        )


def _batch_size(state: State, feed: Feed, steps: int) -> int:
    """Images of the coming batch over all processes: batches are nearly equal, the first ones one larger."""
    return feed.images // steps + (state.step < feed.images % steps)


def _step(
    state: State, forward: nn.Module, images: Tensor, labels: Tensor, batch_size: int, views: int, recipe: Recipe,
    compute: Compute,
) -> Tensor:  # fmt: skip
    """One step of the optimiser; returns the sums of losses and of hits over this process's images, (2,) float64."""
    state.optimiser.zero_grad(set_to_none=True)
    seen = torch.zeros(2, dtype=torch.float64, device=images.device)
    parts = np.array_split(np.arange(len(labels)), recipe.accumulate)
    pixels = images.unflatten(0, (views, len(labels)))
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        # Only the last part's backward pass averages gradients over the processes.
        hold = forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()
        with hold:
            mine = pixels[:, part[0] : part[-1] + 1].flatten(0, 1)
            loss, hits = state.objective.loss(forward, mine, labels[part[0] : part[-1] + 1], state.steps_done)
            # DDP takes the mean over processes where the sum is meant.
            share = _seen_by_loss(len(part), len(parts), batch_size, state.objective, images.device) / batch_size
            state.scaler.scale(loss * share * world_size()).backward()
        seen += torch.stack([loss.detach().double() * len(part), hits.double()])
    if recipe.clip_norm:
        state.scaler.unscale_(state.optimiser)
        trained = [parameter for group in state.optimiser.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.schedule.step()
    if state.ema:
        state.ema.update(state.model)
    return seen


def _seen_by_loss(mine: int, parts: int, batch_size: int, objective: Objective, device: torch.device) -> int:
    """Images in the loss of one of a batch's parts: this process's, or where the loss gathers, those of all."""
    if not objective.gathers:
        return mine
    return batch_size if parts == 1 else int(summed(torch.tensor(mine, device=device)))


def _seed(seed: int, epoch: int, step: int) -> None:
    """Of whatever torch draws in this step: dropout, mixing, starts of attacks."""
    (drawn,) = np.random.SeedSequence([seed, epoch, step, rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn))


class _Losses:
    """The losses of the last steps, looked at before anything is kept of what they led to."""

    def __init__(self, state: State, compute: Compute, keeper: "_Keeper") -> None:
        self.state, self.keeper = state, keeper
        self.every = LOOK_AT_LOSS_EVERY if compute.on_gpu else 1
        self.waiting: list[tuple[int, float, Tensor]] = []

    def note(self, loss: Tensor, rate: float) -> None:
        """Of the step that was just made, with the learning rate that it was made with."""
        self.waiting.append((self.state.step + 1, rate, loss))
        if len(self.waiting) >= self.every:
            self.check()

    def check(self) -> None:
        """Stops where one of them is not finite."""
        values = torch.stack([loss for _, _, loss in self.waiting]).tolist() if self.waiting else []
        for (step, rate, _), value in zip(self.waiting, values, strict=True):
            if not math.isfinite(value):
                raise StageError(
                    f"{self.keeper.name}: the loss is {value} at step {step} of epoch {self.state.epoch}, at a "
                    f"learning rate of {rate:g}; lower `lr`, lengthen `warmup`, or set `clip_norm`. "
                    f"{self.keeper.last_good()}"
                )
        self.waiting.clear()


# ------------------------------------------------------------------------------------------- checkpoints and the curve


class _Keeper:
    """Keeps `State` on the disk: every so many steps, when a signal asks to stop, and at the end."""

    def __init__(self, state: State, work: Path, signals: StopSignals, name: str) -> None:
        self.state, self.work, self.signals, self.name = state, work, signals, name
        self.every = _checkpoint_steps()

    def due(self) -> bool:
        """Whether the state after this step is to be kept."""
        return bool(self.signals.came) or self.state.steps_done % self.every == 0

    def stop_if_asked(self) -> None:
        """Ends this process where a signal came. Process 0 decides: the others are stopped by its going."""
        if self.signals.came and is_first():
            logger.info(
                "%s: stopped after step %d of epoch %d; run again to go on",
                self.name,
                self.state.step,
                self.state.epoch,
            )
            sys.exit(128 + self.signals.came)

    @contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """For what does not change the state: a signal stops it at once, and what comes after it is done again."""
        try:
            with self.signals.at_once():
                yield
        except SystemExit:
            self.save()
            raise

    def save(self) -> None:
        """Process 0's state is everybody's, but for running statistics, of which its own count."""
        if is_first():
            save_checkpoint(_checkpoint(self.work), self.state.state_dict())

    def write_progress(self) -> None:
        """The curve so far, a line an epoch."""
        if is_first():
            lines = (json.dumps(metrics) + "\n" for metrics in self.state.curve)
            write_text(self.work / "progress.jsonl", "".join(lines))

    def last_good(self) -> str:
        """What is kept from before an error."""
        path = _checkpoint(self.work)
        if not path.is_file():
            return "No checkpoint had been written yet"
        return f"The last good checkpoint stays in {path} until an epoch is trained with other parameters"


def _checkpoint(work: Path) -> Path:
    return work / "checkpoint.pt"


def _checkpoint_steps() -> int:
    wanted = os.environ.get(CHECKPOINT_STEPS) or "200"
    if not wanted.isdecimal() or not int(wanted):
        raise StageError(f"{CHECKPOINT_STEPS} must be a number of steps, got {wanted!r}")
    return int(wanted)


def _resume(state: State, work: Path, compute: Compute, name: str) -> None:
    kept = load_checkpoint(_checkpoint(work))
    if kept is None:
        return
    state.load_state_dict(kept)
    if is_first():
        logger.info("%s: going on after step %d of epoch %d", name, state.step, state.epoch)


def _finished(curve: list[Metrics], recipe: Recipe) -> bool:
    if len(curve) >= recipe.epochs:
        return True
    if not recipe.patience or not curve:
        return False
    values = [metrics[recipe.monitor] for metrics in curve]
    best = min(values) if recipe.monitor in LOWER_IS_BETTER else max(values)
    return values[::-1].index(best) >= recipe.patience


def _check_val(metrics: Metrics, name: str) -> None:
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise StageError(f"{name}: {key} is {value} after epoch {metrics['epoch']:.0f}; lower `lr`")


def _peak_memory(compute: Compute) -> float:
    """In units of 1,000,000 bytes: of the GPU, or of this process."""
    if compute.on_gpu:
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _describe(metrics: Metrics) -> str:
    words = {"train_loss": "loss", "val_loss": "val loss", "val_top1": "val top-1", "val_robust_top1": "robust top-1"}
    words["knn_top1"] = "k-NN top-1"
    return ", ".join(f"{word} {metrics[key]:.3f}" for key, word in words.items() if key in metrics)
