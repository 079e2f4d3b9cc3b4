"""reset_batchnorm: recompute BatchNorm's running statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fedrebasin.corrections.calls import arguments_of, examples_in, names_of_tensors
from fedrebasin.corrections.passes import Batch
from fedrebasin.corrections.working import batches_for, extract, warn_of_few, working_copy
from fedrebasin.errors import CalibrationError, RebasinError
from fedrebasin.finite import first_not_finite

LOGGER = logging.getLogger("fedrebasin")


@torch.inference_mode(False)
def reset_batchnorm(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    calibration: Iterable[Any],
    *,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Recompute the running statistics of every BatchNorm as the mean over the calibration batches.

    Those that no BatchNorm module holds stay averaged: the log (INFO) names them.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    merged : dict of str to Tensor
        The state dict to correct; it is not changed.
    calibration : iterable of batches
        Inputs, no labels; read once. Batches of 100 and more give good variances; one of a single value per channel has
        none and is left out.
    device : str, optional
        Where the network runs; by default where ``merged`` is.

    Returns
    -------
    dict of str to Tensor
        ``merged`` with other running means and variances; counters stay.

    Raises
    ------
    RebasinError
        If the network has no BatchNorm with running statistics.
    CalibrationError
        If the data is empty, can be read only once, or all batches hold one example.

    Warns
    -----
    UserWarning
        If there are fewer than 100 examples.

    References
    ----------
    Jordan et al. (2023), "REPAIR", Section 3; there it is the first step for networks with BatchNorm.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> reset = reset_batchnorm(net, net.state_dict(), [torch.randn(200, 2)])
    >>> reset["1.running_mean"].shape
    torch.Size([3])
    """
    model = working_copy(net, merged, device)
    norms = norms_with_statistics(model)
    if not norms:
        raise RebasinError(
            "net: reset_batchnorm needs a BatchNorm with running statistics; this network has none; use repair"
        )
    batches = batches_for(net, merged, calibration, device)
    seen = 0

    def inputs() -> Iterator[Batch]:
        nonlocal seen
        for args, kwargs, _ in batches:
            seen += examples_in((args, kwargs))
            yield args, kwargs

    with _ByHand(model, norms) as by_hand:
        renew_statistics(model, norms, inputs())
    for name in by_hand.found:
        LOGGER.info("reset_batchnorm: %r stays averaged: no BatchNorm module holds it; use repair", name)
    warn_of_few(seen, "examples are few for reset_batchnorm", stacklevel=4)
    result = extract(model, merged)
    odd = first_not_finite(result, merged)
    if odd is not None:
        raise CalibrationError(f"calibration: {odd!r} became NaN or infinite; check the models and the inputs")
    return result


def norms_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms that have running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@torch.no_grad()
def renew_statistics(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Batch]) -> None:
    """Give ``norms`` the plain mean over the batches, in one pass by the batch; what no batch reaches stays."""
    before = [{name: tensor.clone() for name, tensor in norm.named_buffers(recurse=False)} for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    reached = False
    for args, kwargs in batches:
        try:
            model(*args, **kwargs)
            reached = True
        except ValueError as error:
            check_too_small(error)
    if not reached:
        raise CalibrationError("calibration: BatchNorm needs batches of more than one example; got none; join some")
    for norm, old in zip(norms, before, strict=True):
        stays = norm.num_batches_tracked is not None and not bool(norm.num_batches_tracked)
        for name, tensor in old.items():
            if stays or name == "num_batches_tracked":
                norm.get_buffer(name).copy_(tensor)


def check_too_small(error: ValueError) -> None:
    """Raise what a pass by the batch has raised, unless a BatchNorm had one value per channel: the batch is left out.

    >>> try:
    ...     _ = nn.BatchNorm1d(2).train()(torch.zeros(1, 2))
    ... except ValueError as error:
    ...     check_too_small(error)
    """
    if "more than 1 value per channel" not in str(error):
        raise error


class _ByHand(TorchFunctionMode):
    """Finds the running statistics that are read by a BatchNorm which is no module."""

    def __init__(self, model: nn.Module, norms: list[_BatchNorm]) -> None:
        super().__init__()
        own = {id(statistics) for norm in norms for statistics in (norm.running_mean, norm.running_var)}
        self._names = {key: name for key, name in names_of_tensors(model).items() if key not in own}
        self.found: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note the statistics that it reads."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            given = arguments_of(func, args, kwargs) or {}
            read = [self._names.get(id(given.get(key))) for key in ("running_mean", "running_var")]
            self.found |= dict.fromkeys(name for name in read if name is not None)
        return func(*args, **kwargs)
