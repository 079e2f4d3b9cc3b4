"""Models that run on their tables' own values alone are proved on them, and a wrong spec is seen there, too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import check_spec, trace
from fedrebasin.errors import InvalidSpecError
from fedrebasin.layout import Free
from fedrebasin.redraw import telling_tables


class Diffusion(nn.Module):
    """As DDPM's training step: a table of shrinking products, whose roots are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("products", torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100), 0))
        self.time, self.one, self.two = nn.Embedding(100, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    products: Tensor

    def forward(self, x: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        share = self.products[step][:, None]
        noised = share.sqrt() * x + (1 - share).sqrt() * noise
        found: Tensor = self.two(F.silu(self.one(noised) + self.time(step)))
        return found


class Flow(nn.Module):
    """A density under a covariance that must stay one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("covariance", torch.eye(4))
        self.net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4))

    mean: Tensor
    covariance: Tensor

    def forward(self, x: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(self.mean, self.covariance, validate_args=False)
        return normal.log_prob(x + self.net(x))  # type: ignore[no-untyped-call]


class Lookup(nn.Module):
    """Straight lines between sorted knots."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.heights = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(6))
        self.register_buffer("knots", torch.linspace(-3, 3, 6))

    knots: Tensor

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).clamp(-2.9, 2.9)
        left = torch.searchsorted(self.knots, h.detach().contiguous()) - 1
        share = (h - self.knots[left]) / (self.knots[left + 1] - self.knots[left])
        found: Tensor = self.last(self.heights[left] + share * (self.heights[left + 1] - self.heights[left]))
        return found


class Angles(nn.Module):
    """Angles to unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 7), nn.Linear(7, 3)
        self.register_buffer("directions", F.normalize(torch.randn(5, 3), dim=1))

    directions: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.acos(0.999 * F.normalize(self.last(self.first(x).relu()), dim=1) @ self.directions.T)


STEPS = (torch.randn(16, 4), torch.randint(100, (16,)), torch.randn(16, 4))


@pytest.mark.parametrize(
    ("net", "inputs", "shapes"),
    [
        (Diffusion, STEPS, {"one": (6,)}),
        (Flow, (torch.randn(3, 4),), {"net.0": (7,)}),
        (Lookup, (torch.randn(4, 3),), {"first": (6,)}),
        (Angles, (torch.randn(4, 4),), {"first": (7,)}),
    ],
)
def test_a_model_that_needs_its_tables_own_values_is_proved(
    net: type[nn.Module], inputs: tuple[Tensor, ...], shapes: dict[str, tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    model = net()
    assert check_spec(model, trace(model, inputs), inputs).perm_shapes == shapes


def test_on_the_tables_own_values_a_wrong_spec_is_still_refused() -> None:
    model, inputs = Diffusion(), STEPS
    right = trace(model, inputs)
    lost = Free("one", 6)
    axes = {**right.axes, "one.weight": (Free("other", 6), right.axes["one.weight"][1]), "one.bias": (lost,)}
    with pytest.raises(InvalidSpecError, match="output"):
        check_spec(model, type(right)(axes=axes, buffers=right.buffers, inputs=right.inputs), inputs)


def test_tables_with_equal_rows_and_running_statistics_are_always_drawn_anew() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 2)
            for name, table in (("equal", torch.ones(3)), ("told", torch.arange(3.0)), ("one", torch.tensor(2.0))):
                self.register_buffer(name, table)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.norm(x) * self.equal * self.told * self.one)
            return found

    net = Net()
    net.norm.running_mean = torch.arange(3.0)
    assert sorted(telling_tables(net, trace(net, (torch.randn(4, 3),)))) == ["one", "told"]
