"""A right-hand side in an implicit and an explicit part, for semi-implicit methods.

The stiff part, often linear and known, is treated implicitly, and the network explicitly. (H. Zhang, Y. Liu, R. Maulik:
Semi-implicit neural ordinary differential equations, AAAI (2025).)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist.petsc import vectors

Part = Callable[..., Any]


class SplitFunction(nn.Module):
    """The right-hand side g + h with g = `implicit(t, u, *args)` and h = `explicit(t, u, *args)`.

    Methods of the family `arkimex` treat g implicitly and h explicitly. All others integrate the sum. Each part is a
    function or a module. g may also be a `PETSc.Mat` A with the row distribution of the state: g = A u. `linear`: the
    function g is linear in u, so one linear solve solves its equations. A Mat is always linear.
    """

    def __init__(self, *, implicit: Part | PETSc.Mat, explicit: Part, linear: bool = False) -> None:
        super().__init__()
        self.implicit = MatrixFunction(implicit) if isinstance(implicit, PETSc.Mat) else implicit
        self.explicit = explicit
        self.linear = linear or isinstance(self.implicit, MatrixFunction)
        for name in ("implicit", "explicit"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable as {name}(t, u) or, for the implicit part, a PETSc.Mat")

    def forward(self, t: torch.Tensor, u: Any, *args: Any) -> Any:
        """Return the sum of both parts. Collective if they are."""
        implicit, explicit = self.implicit(t, u, *args), self.explicit(t, u, *args)
        if isinstance(u, tuple):
            return tuple(a + b for a, b in zip(implicit, explicit, strict=True))
        return implicit + explicit


class MatrixFunction(nn.Module):
    """The function g(u) = A u for a `PETSc.Mat`, differentiable in u. Collective on the Mat's communicator.

    The Mat is not copied. It may be changed between solves, but not between a solve and its backward pass.
    """

    def __init__(self, matrix: PETSc.Mat) -> None:
        super().__init__()
        self.matrix = matrix
        self._in, self._out = matrix.createVecs()

    def forward(self, t: torch.Tensor, u: torch.Tensor, *args: Any) -> torch.Tensor:
        """Return A u in the shape and type of u, computed in PETSc's scalar type."""
        product: torch.Tensor = _Product.apply(u, self, False)  # type: ignore[no-untyped-call]
        return product

    def multiply(self, u: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return A u or A^T u, outside of the autograd graph. Collective."""
        source, target = (self._out, self._in) if transposed else (self._in, self._out)
        if u.numel() != source.getLocalSize():
            raise ValueError(
                f"a state of {u.numel()} entries on this rank for a Mat with {source.getLocalSize()} of its columns"
            )
        vectors.view(source, (u.numel(),)).copy_(u.detach().reshape(-1))
        source.stateIncrease()
        (self.matrix.multTranspose if transposed else self.matrix.mult)(source, target)
        return vectors.view(target, (target.getLocalSize(),)).to(u.dtype, copy=True).view(u.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(u: torch.Tensor, function: MatrixFunction, transposed: bool) -> torch.Tensor:
        return function.multiply(u, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.function, ctx.transposed = inputs
        ctx.state = ctx.function.matrix.stateGet()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if ctx.function.matrix.stateGet() != ctx.state:
            raise RuntimeError(
                "the PETSc.Mat of a linear part of func was changed in place after it had been used, and before its "
                "gradient was taken: change a copy of it"
            )
        product = _Product.apply(cotangents[0], ctx.function, not ctx.transposed)  # type: ignore[no-untyped-call]
        return product, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(tangents[0], ctx.function, ctx.transposed)  # type: ignore[no-untyped-call]
