"""Permute what an optimizer remembers of each parameter: momentum, moments, accumulators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.errors import RebasinError, SpecMismatchError
from fedrebasin.layout import Fixed, Layout, has_leaf, outer_names
from fedrebasin.perms import check_perms
from fedrebasin.permute import permute_tensor
from fedrebasin.spec import PermutationSpec


def permute_optimizer(
    spec: PermutationSpec, perms: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """Put an optimizer's state into the order into which ``permute`` puts the model.

    Training goes on from the permuted model and this state as it would have from the unpermuted ones.

    Parameters
    ----------
    spec : PermutationSpec
        The model's, or the spec of a part of it (``spec.only``): state of other parameters stays as it is.
    perms : dict of str to Tensor
        As for :func:`fedrebasin.permute`.
    optimizer : torch.optim.Optimizer
        One that holds parameters of ``model``; it is not changed. Entries of a parameter's shape are permuted
        (SGD's momentum, Adam's moments, AMSGrad's maxima), and so are Adafactor's row and column statistics; single
        numbers, as step counts, are kept.
    model : nn.Module
        Says what the optimizer's parameters are called; its weights are not read.

    Returns
    -------
    dict
        A new state dict for ``optimizer.load_state_dict``; its tensors share no memory with the optimizer's.

    Raises
    ------
    SpecMismatchError
        If ``perms`` or a parameter's shape do not fit the spec, or no parameter of the optimizer is in it.
    RebasinError
        If the optimizer holds a parameter that the model lacks, or an entry that is tied to no axis (LBFGS).

    References
    ----------
    Elementwise optimizers are equivariant under the hidden units' permutations: Git Re-Basin (2023), Section 2.

    Examples
    --------
    >>> from fedrebasin import permute, trace
    >>> net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> net(torch.ones(2, 1)).sum().backward()
    >>> optimizer.step()
    >>> spec, perms = trace(net, (torch.randn(2, 1),)), {"0": torch.tensor([2, 0, 1])}
    >>> state = permute_optimizer(spec, perms, optimizer, net)
    >>> before = optimizer.state[net[0].bias]["momentum_buffer"]
    >>> bool((state["state"][1]["momentum_buffer"] == before[[2, 0, 1]]).all())
    True
    """
    check_perms(spec, perms)
    names = _names_of_parameters(optimizer, model)
    if spec.axes and not any(name in spec.axes for name in names.values()):
        raise SpecMismatchError(
            f"optimizer: none of its parameters is in the spec, e.g. {next(iter(names.values()), None)!r}; use "
            "the spec of this model"
        )
    saved = optimizer.state_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    state: dict[Any, Any] = {}
    for index, entries in saved["state"].items():
        name = names[index]
        if name in spec.axes and spec.shapes[name] != shapes[name]:
            raise SpecMismatchError(
                f"model: expected {name!r} as {spec.shapes[name]}; got {shapes[name]}; use the spec of this model"
            )
        layouts = spec.axes.get(name)
        state[index] = {
            entry: _own(value) if layouts is None else _permute_entry(layouts, perms, value, f"{name}: {entry}")
            for entry, value in entries.items()
        }
    return {**saved, "state": state}


def _names_of_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """What each parameter is called, by its index in the optimizer's state dict."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[int, str] = {}
    for group, saved in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            if id(parameter) not in known:
                raise RebasinError(
                    f"optimizer: it holds a parameter of shape {tuple(parameter.shape)} that is not one of the "
                    "model's; give the model that it was made for"
                )
            names[index] = known[id(parameter)]
    return names


def _permute_entry(layouts: tuple[Layout, ...], perms: Mapping[str, Tensor], value: Any, label: str) -> Any:
    """Permute one entry along the axes that it has of its parameter."""
    if not isinstance(value, Tensor):
        if isinstance(value, list | tuple | dict):
            raise _not_tied(label, f"a {type(value).__name__}")
        return value
    shape = tuple(layout.size for layout in layouts)
    if tuple(value.shape) == shape:
        return permute_tensor(layouts, perms, value)
    if value.numel() == 1:
        return _own(value)
    # a mean over some axes, which are kept with size 1 (Adafactor)
    reduced = len(value.shape) == len(shape) and all(
        size in (1, layout.size) for size, layout in zip(value.shape, layouts, strict=True)
    )
    kept = (
        [
            layout if size == layout.size else Fixed(1, "a mean over this axis")
            for size, layout in zip(value.shape, layouts, strict=True)
        ]
        if reduced
        else []
    )
    needed = {outer for layout in kept for outer in outer_names(layout)}
    if not reduced or not all(any(has_leaf(layout, outer) for layout in kept) for outer in needed):
        raise _not_tied(label, f"a tensor of shape {tuple(value.shape)}, the parameter has {shape}")
    return permute_tensor(kept, perms, value)


def _not_tied(label: str, what: str) -> RebasinError:
    return RebasinError(
        f"optimizer: {label} is {what}, whose order is not known; start this optimizer anew after the permutation"
    )


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
