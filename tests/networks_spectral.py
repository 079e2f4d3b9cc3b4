"""Networks that compute in frequencies, some with complex weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Spectral(nn.Module):
    """A convolution by a matrix of its own for each of the lowest frequencies."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(x)
        low = torch.einsum("bix,iox->box", waves[:, :, : self.modes], self.weight)
        return torch.fft.irfft(F.pad(low, (0, waves.shape[-1] - self.modes)), n=x.shape[-1])


class FourierOperator(nn.Module):
    """Li et al. (ICLR 2021), "Fourier neural operator", in one dimension."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.lift, self.out = nn.Conv1d(2, channels, 1), nn.Conv1d(channels, 1, 1)
        self.spectral = nn.ModuleList(Spectral(channels, 3) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        found: Tensor = self.out(x)
        return found


class GlobalFilter(nn.Module):
    """Rao et al. (NeurIPS 2021), "Global filter networks": (batch, height, width, channel), weights as pairs."""

    def __init__(self, channels: int = 5, size: int = 4) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, channels), nn.LayerNorm(channels)
        self.filter = nn.Parameter(torch.randn(size, size // 2 + 1, channels, 2))
        self.mix, self.back = nn.Linear(channels, 7), nn.Linear(7, channels)
        self.head = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        waves = torch.fft.rfft2(self.norm(x), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        x = x + self.back(F.gelu(self.mix(torch.fft.irfft2(waves, s=x.shape[1:3], dim=(1, 2), norm="ortho"))))
        found: Tensor = self.head(x.mean((1, 2)))
        return found


class Complex(nn.Module):
    """Complex numbers in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(*sizes, dtype=torch.cfloat) for sizes in ((4, 8), (8, 2)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found: Tensor = self.last(torch.complex(hidden.real.relu(), hidden.imag.relu()))
        return found


class Shifted(nn.Module):
    """Transforms along several axes, frequencies in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.fftshift(torch.fft.fftn(F.relu(self.first(x)), s=(6, 6)), dim=(-2, -1))
        found: Tensor = self.last(torch.fft.ifft2(torch.fft.ifftshift(waves * waves.abs(), dim=(-2, -1))).real)
        return found


SPECTRAL = {
    "fourier-operator": lambda: (FourierOperator(), (torch.zeros(2, 2, 8),), [(6,), (6,), (6,)]),
    "global-filter": lambda: (GlobalFilter(), (torch.zeros(2, 4, 4, 3),), [(5,), (7,)]),
    "shifted": lambda: (Shifted(), (torch.zeros(2, 3, 8, 8),), [(5,)]),
    "complex": lambda: (Complex(), (torch.zeros(3, 4, dtype=torch.cfloat),), [(8,)]),
}
