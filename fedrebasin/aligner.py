"""PermutationAligner: weight matching, activation matching and permuting for plain dicts of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedrebasin.assignment import best_assignment
from fedrebasin.batches import batches_of
from fedrebasin.chain import chain_spec
from fedrebasin.check import proved_trace
from fedrebasin.errors import CalibrationError, SpecMismatchError
from fedrebasin.matching.activation import activation_matching
from fedrebasin.matching.correlation import CrossMoments
from fedrebasin.matching.weight import weight_matching
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec

#: A state dict of NumPy arrays or of tensors; answers are of the same kind.
Arrays = Mapping[str, Any]
#: Activations of each hidden layer by its name, shape ``(examples, units, ...)``, or what makes them of a batch.
Activations = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


class PermutationAligner:
    """Align one network to another where there are arrays and, if need be, no module.

    Without ``spec`` the dicts have to be those of a sequential network, in the order of its layers (see
    :func:`fedrebasin.chain_spec`). Units are permuted only, never negated or scaled, so that the network's function
    stays.

    Parameters
    ----------
    spec : PermutationSpec, optional
        Of the network, if it is no chain.
    seed : int
    restarts : int
        As for :func:`fedrebasin.weight_matching`.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Sections 3.1 and 3.2.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a = {"w1": rng.normal(size=(3, 2)), "b1": rng.normal(size=3), "w2": rng.normal(size=(1, 3))}
    >>> b = {"w1": a["w1"][[2, 0, 1]], "b1": a["b1"][[2, 0, 1]], "w2": a["w2"][:, [2, 0, 1]]}
    >>> aligner = PermutationAligner()
    >>> perms = aligner.weight_match(a, b)
    >>> perms
    {'w1': array([1, 2, 0])}
    >>> bool((aligner.apply_permutations(b, perms)["w2"] == a["w2"]).all())
    True
    """

    def __init__(self, *, spec: PermutationSpec | None = None, seed: int = 0, restarts: int = 0) -> None:
        self.spec = spec
        self._seed, self._restarts = seed, restarts

    def weight_match(self, weights_a: Arrays, weights_b: Arrays) -> dict[str, Any]:
        """Permutations that bring B's weights nearest to A's.

        Parameters
        ----------
        weights_a, weights_b : dict of str to array
            NumPy arrays or tensors with the same keys and shapes.

        Returns
        -------
        dict of str to array
            For each hidden layer an int64 index vector: unit ``perm[i]`` of B takes place ``i``. Arrays if
            ``weights_b`` has arrays, otherwise tensors.

        Raises
        ------
        SpecMismatchError
            If the dicts are not those of one chain, or a hidden layer holds a NaN or an infinity.
        """
        spec = self._spec_of(weights_b)
        found = weight_matching(
            *(spec, _tensors(weights_a), _tensors(weights_b)), seed=self._seed, restarts=self._restarts
        )
        return _like(weights_b, found.perms)

    def activation_match(
        self, model_a: nn.Module | Activations, model_b: nn.Module | Activations, calibration_data: Any = None
    ) -> dict[str, Any]:
        """Permutations under which B's units respond to data most like A's.

        Parameters
        ----------
        model_a, model_b : nn.Module, dict of str to array, or callable
            Modules of one architecture, which is traced and proved, so that it need not be a chain (``spec`` then
            becomes what was traced); or for each hidden layer, under the name of its permutation, the activations
            ``(examples, units, ...)`` on the same examples; or functions from a batch to such a dict.
        calibration_data : iterable of batches
            Of modules and functions; ``None`` for dicts.

        Returns
        -------
        dict of str to array
            As for :meth:`weight_match`; of activations, for the layers that are there.

        Raises
        ------
        CalibrationError
            If there is no data, too little of it, or the models' activations do not fit each other.
        """
        if isinstance(model_a, nn.Module) and isinstance(model_b, nn.Module):
            batches = batches_of(model_a, _given(calibration_data), name="calibration_data")
            if self.spec is None:
                args, kwargs, _ = next(iter(batches))
                example = kwargs or args
                self.spec = proved_trace(model_a, example, seed=self._seed)
            states = model_a.state_dict(), model_b.state_dict()
            return activation_matching(self.spec, model_a, *states, calibration_data, seed=self._seed).perms
        if isinstance(model_a, nn.Module) or isinstance(model_b, nn.Module):
            raise CalibrationError("model_a, model_b: expected two modules, or activations of both; got one module")
        sums: dict[str, CrossMoments] = {}
        kind: Mapping[str, Any] = {}
        for first, second in _pairs(model_a, model_b, calibration_data):
            kind = second
            for name, (one, other) in _matched(first, second).items():
                sums.setdefault(name, CrossMoments()).add(one, other)
        for name, moments in sums.items():
            if moments.count < 2 or not moments.finite:
                raise CalibrationError(f"{name!r}: expected two finite observations and more; got {moments.count}")
        return _like(kind, {name: best_assignment(moments.correlation()) for name, moments in sums.items()})

    def apply_permutations(self, weights: Arrays, permutations: Arrays) -> dict[str, Any]:
        """Put the units of a network into another order; its function stays.

        Parameters
        ----------
        weights : dict of str to array
        permutations : dict of str to array
            Of :meth:`weight_match` or :meth:`activation_match`; a layer that is not there stays as it is.

        Returns
        -------
        dict of str to array
            New arrays or tensors, like ``weights``, with the same keys, order and dtypes.

        Raises
        ------
        SpecMismatchError
            If a permutation is none, or of no layer of these weights.
        """
        spec = self._spec_of(weights)
        unknown = next((name for name in permutations if name not in spec.perm_shapes), None)
        if unknown is not None:
            raise SpecMismatchError(
                f"permutations: expected some of {', '.join(map(repr, spec.perm_shapes))}; got {unknown!r}"
            )
        stay = {name: torch.arange(shape[-1], device="cpu").expand(shape) for name, shape in spec.perm_shapes.items()}
        perms = {**stay, **_tensors(permutations)}
        return _like(weights, permute(spec, perms, _tensors(weights)))

    def _spec_of(self, weights: Arrays) -> PermutationSpec:
        return chain_spec(weights) if self.spec is None else self.spec


def _given(data: Any) -> Iterable[Any]:
    if data is None:
        raise CalibrationError("calibration_data: expected a collection of input batches; got None")
    found: Iterable[Any] = data
    return found


def _pairs(one: Activations, other: Activations, data: Any) -> Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [(one, other)]
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        raise CalibrationError("model_a, model_b: expected two functions or two dicts of activations; got one of each")
    return ((one(batch), other(batch)) for batch in _given(data))


def _matched(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer both networks' units as rows, one column for each observation."""
    if not first or set(first) != set(second):
        raise CalibrationError(f"activations: expected the same layers twice; got {list(first)} and {list(second)}")
    found = {}
    for name, tensor in _tensors(first).items():
        other = _tensor(second[name])
        if tensor.shape != other.shape or tensor.ndim < 2:
            raise CalibrationError(
                f"activations: expected {name!r} twice as (examples, units, ...); got {tuple(tensor.shape)} and "
                f"{tuple(other.shape)}"
            )
        found[name] = _rows(tensor), _rows(other)
    return found


def _rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().movedim(1, 0).reshape(tensor.shape[1], -1)
    return rows if rows.dtype == torch.float64 else rows.float()


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: Any) -> Tensor:
    """Of an array that torch would not take as it is (read-only, reversed, of the other byte order), a copy."""
    if isinstance(array, np.ndarray):
        array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    return (array if isinstance(array, Tensor) else torch.as_tensor(array, device="cpu")).detach()


def _like(arrays: Arrays, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """As NumPy arrays if ``arrays`` are."""
    if any(isinstance(array, np.ndarray | np.generic) for array in arrays.values()):
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return dict(tensors)
