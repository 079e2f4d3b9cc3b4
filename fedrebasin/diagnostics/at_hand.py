"""The same measures as functions of activations at hand."""

from __future__ import annotations

from torch import Tensor

from fedrebasin.diagnostics.measures import Cka, Measure, Procrustes, Relative, Units
from fedrebasin.errors import CalibrationError


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two networks' activations on the same examples, debiased.

    Parameters
    ----------
    first, second : Tensor, shape (units, examples, ...)
        At least 4 examples; the numbers of units may differ.

    Returns
    -------
    float
        1 for representations that are equal up to rotation, scale and shift; about 0 for unrelated ones. It does not
        change when units are permuted.

    Raises
    ------
    CalibrationError
        If there are fewer examples, or not as many twice.

    References
    ----------
    Kornblith et al. (2019), "Similarity of neural network representations revisited"; Song et al. (2012), Equation 5,
    for the unbiased HSIC; Nguyen et al. (2021), Equation 4, for minibatches.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    >>> round(linear_cka(x, 2 * x[[2, 0, 1]] + 1), 6)
    1.0
    """
    return _of(Cka(), first, second, same_units=False)


def procrustes_distance(first: Tensor, second: Tensor) -> float:
    """``min_R |X R - Y|`` over orthogonal R, for centred activations X and Y of Frobenius norm 1.

    Parameters
    ----------
    first, second : Tensor, shape (units, examples, ...)

    Returns
    -------
    float
        In [0, sqrt(2)]; it does not change when units are permuted.

    Raises
    ------
    CalibrationError
        If shapes differ.

    References
    ----------
    Schoenemann (1966); Ding, Denain and Steinhardt (2021), "Grounding representation similarity".

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> procrustes_distance(x, 2 * x[[2, 0, 1]] + 1) < 1e-6
    True
    """
    return _of(Procrustes(), first, second)


def relative_similarity(first: Tensor, second: Tensor) -> float:
    """The mean cosine of each example's relative representations in two networks, all examples being anchors.

    The representation of an example is its cosines with the anchors, about the anchors' mean.

    Parameters
    ----------
    first, second : Tensor, shape (units, examples, ...)
        The numbers of units may differ.

    Returns
    -------
    float
        At most 1; it does not change when units are permuted.

    Raises
    ------
    CalibrationError
        If there are not as many examples twice.

    References
    ----------
    Moschella et al. (2023), "Relative representations enable zero-shot latent space communication"; there without
    centring, which leaves the activations of ReLU networks all alike.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    >>> round(relative_similarity(x, 2 * x[[2, 0, 1]] + 1), 6)
    1.0
    """
    return _of(Relative(), first, second, same_units=False)


def unit_correlation(first: Tensor, second: Tensor) -> float:
    """The mean over units of Pearson's correlation of unit i of one network with unit i of the other.

    Parameters
    ----------
    first, second : Tensor, shape (units, examples, ...)

    Returns
    -------
    float
        In [-1, 1]. Of the measures here it alone changes when units are permuted: it is what alignment raises.

    Raises
    ------
    CalibrationError
        If shapes differ.

    References
    ----------
    Li et al. (2016), "Convergent learning".

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    >>> round(unit_correlation(x, 2 * x + 1), 6), unit_correlation(x, x[[2, 0, 1]]) < 0.5
    (1.0, True)
    """
    return _of(Units(), first, second)


def _of(measure: Measure, first: Tensor, second: Tensor, *, same_units: bool = True) -> float:
    shapes = tuple(first.shape), tuple(second.shape)
    fit = shapes[0] == shapes[1] if same_units else min(map(len, shapes)) > 1 and shapes[0][1] == shapes[1][1]
    if min(map(len, shapes)) < 2 or not fit:
        raise CalibrationError(
            f"activations: expected (units, examples, ...) of {'one shape' if same_units else 'as many examples'} "
            f"twice; got {shapes[0]} and {shapes[1]}"
        )
    measure.add(first.detach(), second.detach())
    return measure.value()
