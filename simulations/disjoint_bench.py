"""The network, its spec and the fixed images of the disjoint experiment: what turns state dicts into numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import Matching, check_spec, interpolate, trace
from fedrebasin.connectivity import LossPath, barrier_above_chord, loss_barrier
from fedrebasin.corrections import methods as corrections
from fedrebasin.matching.methods import METHODS, MatchingSetting, find_matching
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.ends import EndConfig, make_model
from fedrebasin.simulations.measures import measure
from fedrebasin.simulations.similarity_plot import similarities
from fedrebasin.simulations.training import predict

State = dict[str, Tensor]
Logits = dict[str, Tensor]

#: correction in the names of rows and curves -> name of the method
CORRECTIONS = {
    name: name
    for name, method in corrections.CORRECTIONS.items()
    # what a merge gets by data that is held
    if method.inputs and method.merge and not method.rereads and name != "reset-batchnorm"
} | {"reset": "reset-batchnorm"}
TRAIN_IMAGES = 5000
#: one draw for all seeds decides which training images calibrate and on which the training loss is measured
ROWS_SEED = 7
BATCH = 250


@dataclass(frozen=True)
class Effort:
    """How B is matched, how finely the path is measured, and which corrections are computed on how many images.

    ``corrections`` are names of ``CORRECTIONS``; None stands for all that the network can have.
    """

    lams: int
    corrected_lams: int
    calibration_images: int
    curve_calibration_images: int
    matching: str = "weight"
    corrections: tuple[str, ...] | None = None


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
        chosen = CORRECTIONS if effort.corrections is None else effort.corrections
        self.corrections = ["", *(name for name in chosen if normalised or name != "reset")]

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
            batches = self.calibration(self.effort.calibration_images)
        if method.targets:
            batches = list(zip(batches, torch.split(self.labels["calibration"], self.batch), strict=True))
        loss = F.cross_entropy if method.targets else None
        setting = MatchingSetting(self.spec, self.net, batches, loss=loss, seed=seed, device=self.device)
        return find_matching(self.effort.matching, setting, a, b)

    def similarity(self, a: State, plain: State, aligned: State) -> dict[str, dict[str, float]]:
        """How alike the layers of A and B respond to the path's calibration images, before and after alignment."""
        # small batches on a GPU, too: of one all layers' activations are held, gigabytes each at the paper's width
        batches = self.calibration(self.effort.curve_calibration_images, BATCH)
        return similarities(self.spec, self.net, (a, plain), (a, aligned), batches)

    def calibration(self, images: int, batch: int | None = None) -> list[Tensor]:
        """The first ``images`` calibration images, in batches of ``batch``, by default the bench's."""
        chosen = self.images["calibration"][:images]
        return [self.data.normalise(chunk) for chunk in torch.split(chosen, batch or self.batch)]

    def measure(self, logits: Logits) -> dict[str, dict[str, float]]:
        """Measures on test and training images."""
        return {part: measure(logits[part], self.labels[part]) for part in ("test", "train")}

    def merged(self, a: State, b: State, lam: float, correction: str, images: int) -> State:
        """The point ``lam`` of the path, corrected on the first ``images`` calibration images."""
        state = interpolate(a, b, lam)
        if not correction:
            return state
        weights = [1 - lam, lam]
        setting = corrections.CorrectionSetting(self.net, self.calibration(images), weights, device=self.device)
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
