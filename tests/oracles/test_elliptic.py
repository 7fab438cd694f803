"""The dense elliptic operators are exact where they can be."""

import torch

from tests.oracles.elliptic import diffusion, matrix_of, solved

D = torch.float64


def test_diffusion_is_exact_for_quadratic_fields_and_linear_coefficients() -> None:
    y, x = torch.meshgrid(torch.arange(5, dtype=D) * 0.5, torch.arange(6, dtype=D) * 0.25, indexing="ij")
    # -div(k grad u) with k = 1 + x and u = x^2 + 3 y^2.
    value = diffusion(x.square() + 3 * y.square(), 1 + x, 2.0, ("zero", "zero"), (0.5, 0.25))
    wanted = -(2 * x + 2 * (1 + x) + 6 * (1 + x)) + 2 * (x.square() + 3 * y.square())
    assert torch.allclose(value[1:-1, 1:-1], wanted[1:-1, 1:-1], rtol=1e-13, atol=1e-13)


def test_a_singular_system_is_solved_by_the_field_of_mean_zero() -> None:
    matrix = matrix_of(lambda u: diffusion(u, torch.ones(6, dtype=D), 0.0, ["replicate"], [1.0]), (6,))
    right = torch.arange(6, dtype=D)[:, None]
    found = solved(matrix, right, singular=True)
    assert torch.allclose(matrix @ found, right - right.mean(), atol=1e-13)
    assert abs(found.mean().item()) <= 1e-14
