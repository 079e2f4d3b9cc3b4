"""federated_repair: REPAIR from moments that nodes measure on their own data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin.corrections.affine import Affine, fuse, refresh
from fedrebasin.corrections.first_uses import read_until
from fedrebasin.corrections.moments import Moments, all_moments, output_moments, site_moments
from fedrebasin.corrections.privacy import ClippedMoments
from fedrebasin.corrections.queries import About, Answer, Case, Correction, Node, Query, check_tensors, rms_of
from fedrebasin.corrections.sites import Site, check_found, find_sites
from fedrebasin.corrections.working import extract, warn_of_few
from fedrebasin.errors import RebasinError

KIND = "moments"
Measured = dict[str, Moments]


def federated_repair(case: Case) -> Correction:
    """Set each pre-activation's standard deviation and mean to what the ends have, each on its own node's data.

    With ``c_k`` the coefficients, ``mean_k`` and ``std_k`` those of node k's end and ``mean_m,k`` and ``std_m,k`` the
    merged network's, both on node k's data, a channel becomes

        gain * (x - sum_k c_k mean_m,k) + sum_k c_k mean_k,    gain = sum_k c_k std_k / sum_k c_k std_m,k

    so that a difference between the nodes' data does not count as one between the networks. Where all nodes hold the
    same data it is :func:`fedrebasin.repair`. A BatchNorm gets the statistics of its input first, those of the mixture
    of the nodes with the coefficients as shares.

    One query round a site (in the first one the nodes measure their ends as well), or a single one with
    ``sequential=False``. A node sends a count, a mean and a sum of squares per channel.

    Parameters
    ----------
    case : Case

    Yields
    ------
    Query
        Read into the moments of the merged network and of the end, each by the site's name.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``case.merged``.

    Raises
    ------
    RebasinError
        If no layer can be corrected.

    Warns
    -----
    UserWarning
        If all nodes together have fewer than 100 observations per channel.

    References
    ----------
    Jordan, Sedghi, Saukh, Entezari, Neyshabur (2023), "REPAIR", arXiv 2211.08403.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> state = net.state_dict()
    >>> query = next(federated_repair(Case(net, state, [state, state], [0.5, 0.5], torch.randn(2, 4))))
    >>> query.about["merged-sites"], list(query.merged)
    (['0'], ['0.weight', '0.bias'])
    """
    model = case.model()
    sites = find_sites(model, case.example())
    check_found(sites)
    affine, uses = Affine(max_gain=case.options.max_gain), case.uses(model)
    device = next(iter(model.state_dict().values())).device  # not always that of ``case.merged``
    goals: dict[int, Measured] = {}
    for group in [[site] for site in sites] if case.options.sequential else [sites]:
        asked = [] if goals else sites
        state = extract(model, case.merged)
        needed = read_until(uses, _keys(group), state) if case.options.sequential else tuple(state)
        query = Query(
            KIND,
            {
                "sequential": case.options.sequential,
                "merged-sites": [site.name for site in group],
                **({"end-sites": [site.name for site in asked]} if asked else {}),
            },
            {name: state[name] for name in needed},
            read_until(uses, _keys(asked), state) if asked else (),
            _reader(group, asked, device),
            lambda measured: rms_of([*measured[0].values(), *measured[1].values()]),
        )
        answers: dict[int, tuple[Measured, Measured]] = yield query
        if not goals:
            goals = {place: theirs for place, (_, theirs) in answers.items()}
            few = min(sum(theirs[site.name].count for theirs in goals.values()) for site in sites)
            text = "observations per channel, of all nodes, make noisy statistics"
            warn_of_few(few, text, name="data", stacklevel=6)
        shares = case.shares(answers)
        for site in group:
            ours = {place: measured[site.name] for place, (measured, _) in answers.items()}
            correct_site(model, site, ours, {place: goals[place][site.name] for place in ours}, shares, affine)
    return extract(model, case.merged)


def measure(about: About, node: Node) -> Answer:
    """What a node answers: moments of the sites of the merged network and of its own aligned model."""
    found: Answer = {}
    for whose, part in (("merged", node.merged), ("end", node.end)):
        names = about.get(f"{whose}-sites")
        if not isinstance(names, list):
            continue
        model, batches = node.model(part), node.data()
        by_name = {site.name: site for site in find_sites(model, batches)}
        missing = next((name for name in names if name not in by_name), None)
        if missing is not None:
            raise RebasinError(f"model: the server asks about {missing!r}, which is no site of this node's network")
        sites, make = [by_name[name] for name in names], ClippedMoments.maker(node.privacy)
        if whose == "end":
            measured = output_moments(model, batches, sites, make)
        elif not about["sequential"]:
            if node.privacy is not None and any(isinstance(module, _BatchNorm) for module in model.modules()):
                raise RebasinError(
                    "privacy: all sites at once go by the statistics of a batch, in which one example changes what the "
                    "others give; have the server ask with sequential=True"
                )
            measured = all_moments(model, batches, sites, make)
        else:
            measured = {names[0]: site_moments(model, batches, sites[0], make)}
        for name, moments in measured.items():
            moments = moments.release() if isinstance(moments, ClippedMoments) else moments
            found[f"{whose}.{name}.count"] = torch.tensor(moments.count, device="cpu")
            found[f"{whose}.{name}.mean"], found[f"{whose}.{name}.squares"] = moments.mean, moments.squares
    return found


def count_releases(about: About) -> int:
    """How many vectors of moments an answer holds: one a site and network.

    >>> count_releases({"merged-sites": ["1"], "end-sites": ["1", "3"]})
    3
    """
    return sum(len(sites) for sites in (about.get("merged-sites"), about.get("end-sites")) if isinstance(sites, list))


def correct_site(
    model: nn.Module,
    site: Site,
    ours: dict[int, Moments],
    theirs: dict[int, Moments],
    shares: dict[int, float],
    affine: Affine,
) -> None:
    """Correct one site by the moments of the merged network's output (a BatchNorm's input) and of the ends'.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> _ = net.load_state_dict({"0.weight": torch.ones(1, 1), "0.bias": torch.zeros(1)})
    >>> def of(mean: float, std: float) -> Moments:
    ...     return Moments.of(1, torch.tensor([mean]).double(), torch.tensor([std**2]).double())
    >>> ours, theirs = {0: of(0, 1), 1: of(0, 3)}, {0: of(1, 2), 1: of(3, 6)}
    >>> correct_site(net, Site("0", 1, 1, "0.weight", "0.bias"), ours, theirs, {0: 0.5, 1: 0.5}, Affine())
    >>> net[0].weight.item(), net[0].bias.item()
    (2.0, 2.0)
    """
    now = _average(ours, shares)
    if site.running is not None:
        now = _refresh(model, site, ours, shares)
    goal = _average(theirs, shares)
    fuse(model, site, now, goal.mean, goal.std, affine.max_gain)


def _average(parts: dict[int, Moments], shares: dict[int, float]) -> Moments:
    """Moments whose mean and standard deviation are the weighted means of those."""
    mean, std = torch.zeros((), dtype=torch.float64, device="cpu"), torch.zeros((), dtype=torch.float64, device="cpu")
    for place, moments in parts.items():
        mean = mean + shares[place] * moments.mean
        std = std + shares[place] * moments.std
    return Moments.of(1, mean, std.square())


def _refresh(model: nn.Module, site: Site, into: dict[int, Moments], shares: dict[int, float]) -> Moments:
    """Give a BatchNorm the statistics of the mixture of the nodes' inputs; the average moments of its output."""
    average = _average(into, shares)
    variance = torch.zeros_like(average.mean)
    for place, moments in into.items():
        between, within = (moments.mean - average.mean).square(), moments.squares / max(1, moments.count - 1)
        variance = variance + shares[place] * (within + between)
    return refresh(model, site, average, variance)


def _reader(
    ours: list[Site], theirs: list[Site], device: torch.device
) -> Callable[[Answer], tuple[Measured, Measured]]:
    def read(answer: Answer) -> tuple[Measured, Measured]:
        found: list[Measured] = []
        for whose, sites in (("merged", ours), ("end", theirs)):
            measured: Measured = {}
            for site in sites:
                name, size = f"{whose}.{site.name}", (site.channels,)
                check_tensors(answer, {f"{name}.count": (), f"{name}.mean": size, f"{name}.squares": size})
                count, mean, squares = (answer[f"{name}.{part}"] for part in ("count", "mean", "squares"))
                if int(count) < 1 or bool((squares < 0).any()):
                    raise RebasinError(f"{name!r} without observations, or with a negative sum of squares")
                measured[site.name] = Moments.of(int(count), mean.to(device), squares.to(device))
            found.append(measured)
        return found[0], found[1]

    return read


def _keys(sites: list[Site]) -> list[str]:
    """Keys of the sites' own tensors."""
    return [key for site in sites for key in site.keys]
