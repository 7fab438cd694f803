"""The spectral step is the equation that it names, and its model is the formula of its parts."""

from __future__ import annotations

import math

import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, SpectralPartition
from pnode_dist.bench import spectral_scaling, spectral_step
from pnode_dist.bench.cost_model import Network, Work
from pnode_dist.bench.spectral_model import SpectralModel
from pnode_dist.bench.spectral_step import BETA, COUPLING, TRANSFORMED, SpectralStep, TwoLayers
from tests.oracles.right_hand_sides import distance, random

D = torch.float64
MODEL = SpectralModel(
    Work(((1024, 1.0), (4096, 3.0))),
    fields=(2, 4),
    mode_bytes=8,
    gradient_bytes=12,
    network=Network(1e-3, 1e6),
    packing=1e-7,
    contention=1.5,
    cores=2,
)


def test_one_rank_takes_what_was_measured() -> None:
    found = MODEL.predict((64, 64), 1, one_node=True)
    assert (found.seconds, found.halo, found.gradient_sum) == (3.0, 0.0, 0.0)


def test_transposes_cost_latencies_bytes_and_packing() -> None:
    found = MODEL.predict((64, 64), 4, one_node=False)
    assert found.work == pytest.approx(1.5 * 1.0)
    # A slab of 16 rows of 33 wave numbers; three quarters of it go to three other ranks, there and back.
    sent = [16 * 33 * fields * 8 * 3 / 4 for fields in (2, 4)]
    assert found.halo == pytest.approx(2 * sum(3 * 1e-3 + size * (1e-6 + 1e-7) for size in sent))
    assert found.gradient_sum == pytest.approx(2 * (1e-3 + 12e-6))
    assert MODEL.predict((64, 64), 4, one_node=True).work == pytest.approx(2 * found.work)


def test_a_projection_ends_where_a_rank_would_have_no_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_scaling, "PROJECTED_POINTS", 256)
    rows = spectral_scaling.projected(MODEL, (32, 64))
    strong = [row["ranks"] for row in rows if row["what"] == "projected strong"]
    assert strong == [4, 16, 64]
    assert MODEL.most_ranks((256, 256)) == 129
    weak = {row["ranks"]: row["grid"] for row in rows if row["what"] == "projected weak"}
    assert weak[1024] == "1024x2048"
    assert all(math.isfinite(float(row["efficiency"])) and float(row["efficiency"]) <= 1 for row in rows)


def derivative(field: torch.Tensor, axis: int, order: int = 1) -> torch.Tensor:
    """A derivative of a field `[y, x]` on a square of sides 2 pi, along one axis by its own transform."""
    n = field.shape[axis]
    numbers = torch.fft.fftfreq(n, 1 / n, dtype=D)
    numbers = numbers.view(-1, 1) if axis == 0 else numbers
    return torch.fft.ifft((1j * numbers) ** order * torch.fft.fft(field, dim=axis), dim=axis).real


def laplacian(field: torch.Tensor) -> torch.Tensor:
    return derivative(field, 0, 2) + derivative(field, 1, 2)


def test_the_rate_is_that_of_the_quasi_geostrophic_equations() -> None:
    n = 24
    spectrum = SpectralPartition(GridPartition(MPI.COMM_SELF, (n, n), channels=2, boundary="periodic"))
    # Few waves, so that the product of two is resolved and nothing is masked.
    low = torch.zeros(2, n, n // 2 + 1, dtype=torch.complex128)
    low[:, :3, :3] = torch.complex(random(2, 3, 3), random(2, 3, 3, seed=2))
    upper, lower = torch.fft.irfft2(low, s=(n, n))
    upper, lower = upper - upper.mean(), lower - lower.mean()
    func = TwoLayers(spectrum, D)
    with torch.no_grad():
        func.viscosity.fill_(1e-6)
    rates = []
    pairs = [(upper, lower, 0.5 * func.shear, 0.0), (lower, upper, -0.5 * func.shear, func.drag)]
    vorticities = [laplacian(psi) + COUPLING * (other - psi) for psi, other, _, _ in pairs]
    for (psi, _, mean, drag), q in zip(pairs, vorticities, strict=True):
        u, v = -derivative(psi, 0), derivative(psi, 1)
        diffused = q
        for _ in range(4):
            diffused = laplacian(diffused)
        rate = -(u * derivative(q, 1) + v * derivative(q, 0)) - mean * derivative(q, 1)
        rate = rate - (BETA + 2 * COUPLING * mean) * v - func.viscosity * diffused - drag * laplacian(psi)
        rates.append(rate)
    found = func(torch.zeros(()), torch.stack(vorticities, dim=-1))
    assert distance(found, torch.stack(rates, dim=-1)) <= 1e-10


def test_the_transposes_are_those_of_the_right_hand_side(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SpectralStep(MPI.COMM_SELF, (12, 16))
    found: list[int] = []
    for name in ("rfft2", "irfft2"):
        original = getattr(spectral_step, name)
        monkeypatch.setattr(
            spectral_step, name, lambda x, *rest, original=original: found.append(x.shape[-1]) or original(x, *rest)
        )
    with torch.no_grad():
        step.func(torch.zeros(()), step.state)
    assert tuple(found) == TRANSFORMED
