"""The paper's experiment for one seed, from trained ends to numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import Matching, check_spec, interpolate, permute, trace
from fedrebasin.connectivity import LossPath, barrier_above_chord, loss_barrier
from fedrebasin.corrections import methods as corrections
from fedrebasin.matching.methods import METHODS, Setting, find_matching
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.ends import EndConfig, make_model
from fedrebasin.simulations.measures import (
    correct_prior,
    fit_temperature,
    label_prior,
    mean_of_probabilities,
    measure,
    reliability,
)
from fedrebasin.simulations.training import predict

State = dict[str, Tensor]
Logits = dict[str, Tensor]

#: correction in the names of rows and curves -> name of the method
CORRECTIONS = {
    name: name
    for name, method in corrections.CORRECTIONS.items()
    if method.inputs and name != "reset-batchnorm"  # what is computed on data
} | {"reset": "reset-batchnorm"}
#: those that are cheap enough to be followed along the path
ON_PATH = ("", "reset", "repair")
TRAIN_IMAGES = 5000
#: one draw for all seeds decides which training images calibrate and on which the training loss is measured
ROWS_SEED = 7
BATCH = 250


@dataclass(frozen=True)
class Effort:
    """How B is matched, how finely the path is measured, and on how many images corrections are computed."""

    lams: int
    corrected_lams: int
    calibration_images: int
    curve_calibration_images: int
    matching: str = "weight"


def measure_seed(
    data: Dataset,
    states: Mapping[str, State],
    rows: Mapping[str, Tensor],
    *,
    end: EndConfig,
    effort: Effort,
    device: torch.device,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Match B to A, and measure ends, baselines, merges and paths.

    Parameters
    ----------
    states, rows : mapping
        State dict and training rows of ``"a"``, ``"b"`` and ``"all"``.

    Returns
    -------
    dict
        ``rows``: measures of every model, on test and training images; ``curves``: the same along lam;
        ``reliability``; ``matching``; ``temperatures``; ``seconds``.
    """
    label = f"seed {end.seed}"
    bench = Bench(data, end, effort, device)
    a, b = states["a"], states["b"]
    matching = bench.match(a, b, end.seed)
    progress(f"{label}: matched in {matching.seconds:.1f} s, {matching.moved_fraction:.0%} of the units moved")
    others = {"plain": bench.place(b), "aligned": bench.place(permute(bench.spec, matching.perms, b))}
    a = bench.place(a)

    started = time.perf_counter()
    logits = _baselines(bench, states, rows)
    temperatures: dict[str, float] = {}
    for path, other in others.items():
        logits |= _middle(bench, path, a, other, temperatures)
    found: dict[str, Any] = {name: bench.measure(one) for name, one in logits.items()}
    for name in ("plain", "aligned"):
        progress(
            f"{label}: {name}, test loss {found[name]['test']['loss']:.3f}, top-1 {found[name]['test']['top1']:.1%}"
        )
    middle_seconds = time.perf_counter() - started
    started = time.perf_counter()
    curves = {}
    for path, other in others.items():
        for correction in (one for one in ON_PATH if one in bench.corrections):
            name = _name(path, correction)
            progress(f"{label}: along the path, {name}")
            curves[name] = bench.curve(a, other, correction)
    return {
        "seed": end.seed,
        "rows": found,
        "curves": curves,
        "reliability": {name: reliability(one["test"], bench.labels["test"]) for name, one in logits.items()},
        "temperatures": temperatures,
        "matching": {
            "objective": matching.objective,
            "objective-before": matching.objective_before,
            "moved-fraction": matching.moved_fraction,
            "log10-order": bench.spec.log10_order,
        },
        "seconds": {
            "matching": matching.seconds,
            "middle": middle_seconds,
            "curves": time.perf_counter() - started,
        },
    }


class Bench:
    """The network, its spec and the fixed images, on the device: what turns state dicts into numbers."""

    def __init__(self, data: Dataset, end: EndConfig, effort: Effort, device: torch.device) -> None:
        net = make_model(end, data)
        example = (data.normalise(data.test_images[:2]),)
        self.spec = check_spec(net, trace(net, example), example)
        # a third faster on the CPU, more on a GPU; load_state_dict keeps the layout
        self.net = net.to(device).to(memory_format=torch.channels_last)
        self.data, self.device, self.effort = data, device, effort
        order = torch.from_numpy(np.random.default_rng(ROWS_SEED).permutation(len(data.train_labels)))
        calibration, measured = order[: effort.calibration_images], order[-TRAIN_IMAGES:]
        # temperatures and straight-through matching alone see the labels of calibration images
        self.images = {
            "test": data.test_images.to(device),
            "train": data.train_images[measured].to(device),
            "calibration": data.train_images[calibration].to(device),
        }
        self.labels = {
            "test": data.test_labels,
            "train": data.train_labels[measured],
            "calibration": data.train_labels[calibration],
        }
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
        self.corrections = ["", *(name for name in CORRECTIONS if normalised or name != "reset")]

    def place(self, state: State) -> State:
        """The state dict on the device, where interpolation is fast."""
        return {key: value.to(self.device) for key, value in state.items()}

    def logits(self, state: State, parts: Iterable[str] = ("test", "train")) -> Logits:
        """Logits of the network with these weights, for each part of the images."""
        self.net.load_state_dict(state)
        return {
            part: predict(self.net, self.data, self.images[part], device=self.device, batch=self.batch)
            for part in parts
        }

    @property
    def batch(self) -> int:
        """Images in a forward pass: few enough for a CPU's cache."""
        return BATCH if self.device.type == "cpu" else 8 * BATCH

    def match(self, a: State, b: State, seed: int) -> Matching:
        """Match ``b`` to ``a``; methods that need data see all calibration images."""
        method = METHODS[self.effort.matching]
        batches: Any = None
        if method.inputs:
            batches = [self.data.normalise(chunk) for chunk in torch.split(self.images["calibration"], self.batch)]
        if method.targets:
            batches = list(zip(batches, torch.split(self.labels["calibration"], self.batch), strict=True))
        loss = F.cross_entropy if method.targets else None
        setting = Setting(self.spec, self.net, batches, loss=loss, seed=seed, device=self.device)
        return find_matching(self.effort.matching, setting, a, b)

    def measure(self, logits: Logits) -> dict[str, dict[str, float]]:
        """Measures on test and training images."""
        return {part: measure(logits[part], self.labels[part]) for part in ("test", "train")}

    def merged(self, a: State, b: State, lam: float, correction: str, images: int) -> State:
        """The point ``lam`` of the path, corrected on the first ``images`` calibration images."""
        state = interpolate(a, b, lam)
        if not correction:
            return state
        chosen = self.images["calibration"][:images]
        calibration = [self.data.normalise(chunk) for chunk in torch.split(chosen, self.batch)]
        setting = corrections.Setting(self.net, calibration, [1 - lam, lam], device=self.device)
        return corrections.correct(CORRECTIONS[correction], setting, state, [a, b])

    def curve(self, a: State, b: State, correction: str) -> dict[str, Any]:
        """Measures along the path from ``a`` to ``b``."""
        lams = np.linspace(0, 1, self.effort.corrected_lams if correction else self.effort.lams).tolist()
        points = []
        for lam in lams:
            state = self.merged(a, b, lam, correction, self.effort.curve_calibration_images)
            points.append(self.measure(self.logits(state)))
        curve: dict[str, Any] = {"lams": lams}
        for part in ("test", "train"):
            curve[part] = {key: [point[part][key] for point in points] for key in points[0][part]}
            path = LossPath(lams=tuple(lams), losses=tuple(curve[part]["loss"]))
            curve[part]["loss-barrier"] = loss_barrier(path)
            curve[part]["barrier-above-chord"] = barrier_above_chord(path)
            curve[part]["best-lam"] = path.best_lam
        return curve


def _name(path: str, correction: str) -> str:
    return f"{path}+{correction}" if correction else path


def _baselines(bench: Bench, states: Mapping[str, State], rows: Mapping[str, Tensor]) -> dict[str, Logits]:
    logits = {end: bench.logits(bench.place(states[end])) for end in ("a", "b", "all")}
    parts = ("test", "train")
    for end in ("a", "b"):
        prior = label_prior(bench.data.train_labels[rows[end]], bench.data.classes)
        logits[f"{end}+corrected"] = {part: correct_prior(logits[end][part], prior) for part in parts}
    logits["ensemble-logits"] = {part: (logits["a"][part] + logits["b"][part]) / 2 for part in parts}
    logits["ensemble-probabilities"] = {
        part: mean_of_probabilities([logits["a"][part], logits["b"][part]]) for part in parts
    }
    return logits


def _middle(bench: Bench, path: str, a: State, b: State, temperatures: dict[str, float]) -> dict[str, Logits]:
    """The models at lam = 0.5, with every correction, and with a temperature."""
    found = {}
    for correction in bench.corrections:
        state = bench.merged(a, b, 0.5, correction, bench.effort.calibration_images)
        found[_name(path, correction)] = bench.logits(state)
    plain = bench.logits(interpolate(a, b, 0.5), ("calibration",))["calibration"]
    temperature = fit_temperature(plain, bench.labels["calibration"])
    temperatures[path] = temperature
    found[f"{path}+temperature"] = {part: one / temperature for part, one in found[path].items()}
    return found
