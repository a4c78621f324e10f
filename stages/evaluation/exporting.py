"""Exporting: a classifier as one file that runs without this project, and its comparison with the original.

Every runtime has the same interface: images (n, 3, S, S) uint8 in, logits (n, C) float32 out, both in CPU memory, so
that latencies of a GPU include both copies.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export.passes import move_to_device_pass

from stages.evaluation.metrics import log_probabilities
from stages.runtime.command import StageError
from stages.training.networks.models import Classifier

Logits = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Predict = Callable[[Pixels], Logits]

INPUT, OUTPUT = "images", "logits"
"""Names of the graph's input and output."""
FACTS = "model.json"
"""Name of the facts about the model inside its file: a key of ONNX metadata, an extra file of pt2."""
MOST_OF_ONNX = 2**31 - 2**20
"""Bytes of weights: a protobuf message may have 2 GiB, and holds the graph as well."""
MAX_DIFFERENCE = 1e-3
"""Of any probability: above the effect of another order of summation, below that of a wrong layer or normalisation.
Measured with ResNet-18 on 400 photos: 5e-7. A changed prediction within it is a tie to three digits."""
WARM_UP = 3
TIMED = 40
"""Timed runs, for median and 95th percentile."""
BATCH = 32


def write(model: Classifier, facts: Mapping[str, Any], form: str, path: Path) -> None:
    """Writes the model with a dynamic number of images. The same model gives the same bytes.

    Args:
        model: on the CPU, in evaluation mode.
        facts: kept inside the file as `model.json`; `image_size` and `architecture` are used.
        form: `onnx` (torch.onnx.export through torch.export, weights inside) or `pt2` (torch.export.save).

    Raises:
        StageError: the exporter cannot translate the architecture, or it is too large for ONNX.
    """
    size = sum(value.nbytes for value in model.state_dict().values())
    if form == "onnx" and size > MOST_OF_ONNX:
        raise StageError(f"{size / 1e9:.1f} GB of weights do not fit into one ONNX file (2 GB); use --format pt2")
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporters
            (_write_onnx if form == "onnx" else _write_pt2)(_exported_program(model, facts["image_size"]), text, path)
    except OSError:
        raise
    except Exception as error:  # exporters raise anything on unsupported operators
        first = next(iter(str(error).strip().splitlines()), "")
        raise StageError(
            f"{facts['architecture']} cannot be exported as {form} by torch {torch.__version__}: "
            f"{type(error).__name__}: {first[:300]}"
        ) from error


def _exported_program(model: Classifier, side: int) -> torch.export.ExportedProgram:
    # Two images: torch.export treats a dimension of 0 or 1 as a constant.
    example = (torch.zeros(2, 3, side, side, dtype=torch.uint8),)
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes={INPUT: {0: torch.export.Dim("n", min=1)}})
    for node in program.graph.nodes:  # paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: torch.export.ExportedProgram, text: str, path: Path) -> None:
    import onnx

    for name in ("onnxscript", "onnx_ir"):  # they log every pass over the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    made = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert made is not None  # None only when it writes a file itself
    graph = made.model_proto
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del part.metadata_props[:]  # PyTorch's names and paths
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    del graph.graph.value_info[:]  # intermediate shapes with another name of n; runtimes infer them
    onnx.helper.set_model_props(graph, {FACTS: text})
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def _write_pt2(program: torch.export.ExportedProgram, text: str, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={FACTS: text})


# ---------------------------------------------------------------------------------------------- predicting


def in_torch(model: torch.nn.Module, device: str = "cpu") -> Predict:
    """A model of PyTorch that is on the device already, in float32."""

    def predict(images: Pixels) -> Logits:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(device)).cpu().numpy()

    return predict


def open_exported(path: Path, form: str, threads: int, device: str = "cpu") -> Predict | None:
    """The file in its runtime: ONNX Runtime, or the module that torch.export.load gives.

    None where this ONNX Runtime cannot use the device.

    Args:
        threads: of ONNX Runtime on the CPU; PyTorch's are those of the process.
        device: `cpu` or `cuda`.
    """
    if form == "pt2":
        with path.open("rb") as file:
            program = torch.export.load(file)
        if device != "cpu":
            program = move_to_device_pass(program, device)
        return in_torch(program.module(), device)
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:  # it falls back to the CPU and only logs that
        return None
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: images})[0])


# --------------------------------------------------------------------------------------------- what it is held to


@dataclass(frozen=True)
class Difference:
    """Between two models on the same images."""

    images: int
    logit: float
    """Largest absolute difference of any image and class."""
    probability: float
    """The same of softmax(logits), 0-1."""
    changed: int
    """Images with another predicted class."""


def compare(original: Predict, exported: Predict, batches: Iterable[Pixels]) -> Difference:
    """Both models on the same pixels (n, 3, S, S). NaN counts as an infinite difference."""
    images = changed = 0
    logit = probability = 0.0
    for pixels in batches:
        before, now = original(pixels).astype(np.float64), exported(pixels).astype(np.float64)
        images += len(pixels)
        changed += int((before.argmax(1) != now.argmax(1)).sum())
        logit = max(logit, _largest(before - now))
        probability = max(probability, _largest(np.exp(log_probabilities(before)) - np.exp(log_probabilities(now))))
    return Difference(images, logit, probability, changed)


def _largest(differences: npt.NDArray[np.float64]) -> float:
    largest = float(np.abs(differences).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def check(difference: Difference, form: str) -> None:
    """Checks the difference of the probabilities against `MAX_DIFFERENCE`.

    Raises:
        StageError: the exported model predicts otherwise.
    """
    if not difference.probability <= MAX_DIFFERENCE:
        raise StageError(
            f"the {form} file does not answer as the registered model does: on {difference.images:,} test images its "
            f"probabilities are up to {difference.probability:.3g} away (at most {MAX_DIFFERENCE:g}), logits up to "
            f"{difference.logit:.3g}, and {difference.changed:,} answers change. Nothing was kept of it; try the "
            f"other format"
        )


def latency(predict: Predict, images: Pixels) -> dict[str, list[float]]:
    """Milliseconds of one image and of a batch: median and 95th percentile of `TIMED` runs each, after a warm-up.

    Args:
        images: (n, 3, S, S); the batch is made of them, repeated where they are fewer than a batch.
    """
    batch = np.ascontiguousarray(np.resize(images, (BATCH, *images.shape[1:])))
    singles = [batch[i : i + 1] for i in range(BATCH)]
    return {"single_ms": _milliseconds(predict, singles), "batch_ms": _milliseconds(predict, [batch])}


def _milliseconds(predict: Predict, inputs: list[Pixels]) -> list[float]:
    taken = []
    for i in range(WARM_UP + TIMED):
        began = time.perf_counter()
        predict(inputs[i % len(inputs)])
        taken.append(1000 * (time.perf_counter() - began))
    median, p95 = np.percentile(taken[WARM_UP:], [50, 95])
    return [round(float(median), 3), round(float(p95), 3)]
