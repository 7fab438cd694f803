"""Problems of PETSc's manual for TAO and TS, set up again, and what PETSc 3.26.1 prints for them.

Gray-Scott: src/ts/tutorials/advection-diffusion-reaction/ex5opt_ic.c, test 1. Van der Pol: src/ts/tutorials/
ex20opt_ic.c, test 3. The figures are from the files `output/ex5opt_ic_1.out` and `output/ex20opt_ic_3.out` there.
"""

from __future__ import annotations

import math

import torch

LENGTH, POINTS = 2.5, 64
GRAY_SCOTT = (
    *((8.48202, 7.02449), (1.72589, 2.46827), (0.556599, 1.75419), (0.156354, 0.597748), (0.0882127, 0.375476)),
    *((0.0225069, 0.271766), (0.00668447, 0.14606), (0.000546, 0.0402107), (0.000111998, 0.0184689)),
    *((2.31717e-05, 0.00815069), (6.39425e-06, 0.00479246), (2.30382e-06, 0.00163395), (1.15395e-06, 0.00119575)),
)
"""Function value and residual of the first 13 lines of BLMVM."""
GRAY_SCOTT_ITERATIONS = 28
VAN_DER_POL_FIRST, VAN_DER_POL_LAST = (0.153666, 1.22223), 4.93222e-21
"""Function value and residual of the first line of BNTR, and the function value of the last one.

The lines between differ: the Hessian products of that example are taken about the state at the end of the last solve,
which has overwritten the initial one, and are not those of the point.
"""
VAN_DER_POL_STEPS = 5
VAN_DER_POL_GUESS = (2.2, -0.7)


def gray_scott_state(frequency: float) -> torch.Tensor:
    """The initial field `[y, x, 2]`: a patch of v with humps of the given frequency, and u = 1 - 2 v."""
    axis = torch.arange(POINTS, dtype=torch.float64) * (LENGTH / POINTS)
    hump = torch.where((axis >= 1.0) & (axis <= 1.5), torch.sin(4 * math.pi * frequency * axis) ** 2, 0.0)
    v = hump[:, None] * hump / 4
    return torch.stack([1 - 2 * v, v], dim=-1)


def gray_scott(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The equations of that example on the whole periodic plane."""
    spacing = LENGTH / POINTS
    neighbours = sum(torch.roll(state, step, axis) for axis in (-3, -2) for step in (1, -1))
    laplacian = (neighbours - 4 * state) / spacing**2
    u, v = state.unbind(-1)
    reaction = u * v * v
    return torch.stack(
        [
            8.0e-5 * laplacian[..., 0] - reaction + 0.024 * (1 - u),
            4.0e-5 * laplacian[..., 1] + reaction - (0.024 + 0.06) * v,
        ],
        dim=-1,
    )


def van_der_pol_start(mu: float) -> torch.Tensor:
    """The initial state whose end is observed."""
    return torch.tensor([2.0, -2 / 3 + 10 / (81 * mu) - 292 / (2187 * mu**2)], dtype=torch.float64)


def to_six_digits(value: float) -> float:
    """The number that C prints by %g."""
    return float(f"{value:g}")
