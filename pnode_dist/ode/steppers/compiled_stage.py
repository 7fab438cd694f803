"""Newton's method for a stage and the transposed systems of its adjoint, each compiled into one piece.

They replace the loops of `batched_newton` where f can be compiled as a whole. Jacobians are made by torch.func inside
of the compiled code. Times and sizes of steps are tensors, so that another step needs no other code. All tensors are
in PETSc's scalar type: states `[sample, component]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.petsc import vectors

Whole = Callable[[Any, Callable[[], Callable[..., Any]]], Callable[..., Any] | None]
"""Compiles a function without breaks: takes a key and a maker, and returns the function, or None if that failed."""
_UPDATES = 3
"""Newton updates in one call of compiled code. Most stages need one call."""
ROUNDING = 1e3
"""Residuals of products with f's derivative may be this many units of rounding."""


@dataclass(frozen=True)
class StageCode:
    """The functions to compile for one right-hand side, layout and split into samples."""

    func: Function
    layout: StateLayout
    samples: int
    widths: tuple[int, ...]

    def newton(
        self,
        time: torch.Tensor,
        reach: torch.Tensor,
        base: torch.Tensor,
        y: torch.Tensor,
        first: torch.Tensor,
        tolerances: torch.Tensor,
        mass: torch.Tensor | None,
        args: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Improve the solution `y` of M y - reach g(y) = base. See `batched_newton.solve` for the tests.

        `first` are the norms of the residuals at the beginning, negative in the first call. `tolerances` are those of
        residual, absolute residual and step. Returns the solution, the largest residual of a sample that has not
        converged (0 if all have), and the norms at the beginning.
        """
        for _ in range(_UPDATES):
            update, norms, done, first = self._iterated(time, reach, base, y, first, tolerances, mass, args)
            y = y - torch.where(done.unsqueeze(-1), 0.0, update)
        update, norms, done, first = self._iterated(time, reach, base, y, first, tolerances, mass, args)
        worst = torch.where(done, 0.0, norms).amax()
        # A block without an inverse has no update.
        left = (done & (worst != 0.0)).unsqueeze(-1) | ~torch.isfinite(update)
        y = y - torch.where(left, 0.0, update)
        return y, worst, first

    def transposed(
        self,
        time: torch.Tensor,
        reach: torch.Tensor,
        y: torch.Tensor,
        side: torch.Tensor,
        mass: torch.Tensor | None,
        args: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solve (M - reach J)^T nu = side with the blocks of J at `y`.

        Returns nu, reach J^T nu with the true J, and True if nu solves the system with the true J to rounding.
        """
        _, blocks, pull = self._linearised(time, reach, y, mass, args)
        nu = _solved(blocks.mT, side)
        (product,) = pull(reach * nu)
        moved = nu if mass is None else torch.matmul(mass.mT, nu.unsqueeze(-1)).squeeze(-1)
        scale = side.abs().amax() + nu.abs().amax() + product.abs().amax()
        eps = torch.finfo(self.layout.compute_dtype).eps
        return nu, product, (side - moved + product).abs().amax() <= ROUNDING * eps * scale

    def _iterated(
        self,
        time: torch.Tensor,
        reach: torch.Tensor,
        base: torch.Tensor,
        y: torch.Tensor,
        first: torch.Tensor,
        tolerances: torch.Tensor,
        mass: torch.Tensor | None,
        args: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the Newton update at `y`, the norms of its residuals, the samples that have converged, and `first`."""
        value, blocks, _ = self._linearised(time, reach, y, mass, args)
        residual = (y if mass is None else torch.matmul(mass, y.unsqueeze(-1)).squeeze(-1)) - base - reach * value
        update, norms = _solved(blocks, residual), _norms(residual)
        first = torch.where(first < 0.0, norms, first)
        enough = torch.maximum(first * tolerances[0], tolerances[1] * reach.abs())
        done = (norms <= enough) | (_norms(update) <= tolerances[2] * _norms(y))
        # The tolerance of an infinite residual is infinite.
        return update, norms, done & torch.isfinite(norms), first

    def _linearised(
        self,
        time: torch.Tensor,
        reach: torch.Tensor,
        y: torch.Tensor,
        mass: torch.Tensor | None,
        args: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor]]]:
        """Return g at `y`, the blocks of M - reach J, and the function that multiplies J^T by a vector."""
        components = sum(self.widths)
        value, pull, *_ = torch.func.vjp(lambda states: self._value(time, states, args), y)
        unit = torch.eye(components, dtype=y.dtype)
        (rows,) = torch.func.vmap(pull)(unit.unsqueeze(1).expand(components, self.samples, components))
        return value, (unit if mass is None else mass) - reach * rows.transpose(0, 1), pull

    def _value(self, time: torch.Tensor, states: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        layout = self.layout
        pieces = torch.split(states, list(self.widths), dim=1)
        parts = [
            piece.to(layout.compute_dtype).reshape(shape) for piece, shape in zip(pieces, layout.shapes, strict=True)
        ]
        result = self.func(time, layout.as_state(parts), *args)
        values = tuple(result) if layout.is_tuple else (result,)
        if [tuple(value.shape) for value in values] != list(layout.shapes):
            raise ValueError("func returned another shape than that of the state")
        joined = [
            value.to(states.dtype).reshape(self.samples, width)
            for value, width in zip(values, self.widths, strict=True)
        ]
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)


def _norms(states: torch.Tensor) -> torch.Tensor:
    return states.square().sum(dim=-1).sqrt()


def _solved(blocks: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Solve the systems of all samples. Systems of up to three components by Cramer's rule, which fuses with f.

    Its rounding is that of the residual that the caller computes: Newton's method and the test of `transposed` see it.
    """
    components = sides.shape[-1]
    if components == 1:
        return sides / blocks[..., 0]
    if components == 2:
        signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=blocks.dtype)
        cofactors = blocks.flip((-2, -1)) * signs
    elif components == 3:
        # Cyclic indices carry the signs.
        forward, backward = (1, 1), (-1, -1)
        cofactors = blocks.roll(forward, (-2, -1)) * blocks.roll(backward, (-2, -1))
        cofactors = cofactors - blocks.roll((1, -1), (-2, -1)) * blocks.roll((-1, 1), (-2, -1))
    else:
        found: torch.Tensor = torch.linalg.solve_ex(blocks, sides)[0]
        return found
    determinants = (blocks[..., 0, :] * cofactors[..., 0, :]).sum(dim=-1, keepdim=True)
    return (cofactors * sides.unsqueeze(-1)).sum(dim=-2) / determinants


@dataclass(frozen=True)
class CompiledStage:
    """The compiled functions of a `StageCode`, called with numbers in place of tensors without axes."""

    code: StageCode
    newton_code: Callable[..., Any]
    transposed_code: Callable[..., Any]

    def newton(
        self,
        time: float,
        reach: float,
        base: torch.Tensor,
        y: torch.Tensor,
        tolerances: torch.Tensor,
        most: int,
        mass: torch.Tensor | None,
        args: tuple[Any, ...],
    ) -> tuple[torch.Tensor, int] | None:
        """Return the solution of a stage and the most updates it can have taken; None if it has not converged."""
        layout = self.code.layout
        when = torch.scalar_tensor(time, dtype=layout.compute_dtype)
        far = torch.scalar_tensor(reach, dtype=vectors.scalar_dtype())
        first = torch.full((len(y),), -1.0, dtype=y.dtype)
        before = float("inf")
        for updates in range(_UPDATES, most + 1, _UPDATES + 1):
            found = self.newton_code(when, far, base, y, first, tolerances, mass, args)
            if found is None:
                return None
            y, worst, first = found
            largest = float(worst)
            if largest == 0.0:
                return y, updates
            if not largest < before:
                return None
            before = largest
        return None

    def transposed(
        self,
        time: float,
        reach: float,
        y: torch.Tensor,
        side: torch.Tensor,
        mass: torch.Tensor | None,
        args: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return nu and reach J^T nu of `StageCode.transposed`; None if nu does not solve the system to rounding."""
        when = torch.scalar_tensor(time, dtype=self.code.layout.compute_dtype)
        far = torch.scalar_tensor(reach, dtype=vectors.scalar_dtype())
        found = self.transposed_code(when, far, y, side, mass, args)
        if found is None or not found[2]:
            return None
        return found[0], found[1]


def compiled_stage(
    whole: Whole, func: Function, layout: StateLayout, samples: int, widths: tuple[int, ...]
) -> CompiledStage | None:
    """Return the compiled stage of a right-hand side; None where its state is empty or not on the host."""
    if samples == 0 or (layout.device is not vectors.HOST and layout.device != vectors.HOST):
        return None
    code = StageCode(func, layout, samples, widths)
    made = [
        whole((func, layout, samples, widths, name), lambda name=name: getattr(code, name))  # type: ignore[misc]
        for name in ("newton", "transposed")
    ]
    newton, transposed = made
    return None if newton is None or transposed is None else CompiledStage(code, newton, transposed)
