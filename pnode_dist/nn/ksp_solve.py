"""A linear solve by PETSc as a differentiable layer: x = A^-1 b on a partitioned state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from petsc4py import PETSc
from torch import nn
from torch.autograd.function import once_differentiable

from pnode_dist.errors import ConfigurationError
from pnode_dist.nn.krylov import RTOL, KrylovSolver, NullSpace, null_space
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.autograd.transforms import transforming
from pnode_dist.ode.call_agreement import Agreed, preparation
from pnode_dist.ode.rhs.parameters import Parameters, completeness_check, find_parameters, independent
from pnode_dist.ode.rhs.split import MatrixFunction
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import calls, vectors

Apply = Callable[..., torch.Tensor]


class KSPSolve(nn.Module):
    """The solution x of A x = b on a partitioned state, by PETSc's KSP. Creating it is collective on the partition.

    `operator` is A: a square `PETSc.Mat` with the row distribution of the partition, or a function
    `apply(u, *parameters)` that returns A u for this rank's part u of a state, of `local_shape`. It must be linear in
    u, and may exchange values between ranks. Linearity is checked at the first solve.

    - `symmetric`: A^T = A. The method is then CG, otherwise GMRES.
    - `nullspace`: `"constant"`, or vectors of `local_shape`, which span the null space of A and of A^T. The solution
      has no part in it, and that of b is ignored.
    - `preconditioner`: a `PETSc.Mat` near A, for a function. A Mat A is its own. The default PC is GAMG for a symmetric
      A, PETSc's own otherwise, and none without a Mat.
    - `options`: PETSc's options of the KSP, such as `ksp_rtol`, `ksp_max_it` or `pc_type`. Those of PETSc's command
      line have no effect. CG and GMRES end when the residual is at most `ksp_rtol` times b, in the 2-norm over all
      ranks: 1e-10 by default, and 1e-5 for a function of float32. A residual above 100 times that is an error.

    The solve computes in double precision in the host's memory, and a function in the type and on the device of b.
    A Mat is not copied. It may be changed between solves, but not between a solve and its backward pass.
    Raises `ConfigurationError` for a wrong argument or option.
    """

    def __init__(
        self,
        operator: PETSc.Mat | Apply,
        partition: Partition,
        *,
        symmetric: bool = False,
        nullspace: Literal["constant"] | Sequence[torch.Tensor] | None = None,
        preconditioner: PETSc.Mat | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        comm, shape = partition.comm, tuple(partition.local_shape)
        size = math.prod(shape)
        calls.one_blas_thread()
        with preparation(comm, "KSPSolve") as preparing:
            is_matrix = isinstance(operator, PETSc.Mat)
            if not is_matrix and not callable(operator):
                raise ConfigurationError(
                    f"KSPSolve: operator = {operator!r}: must be a PETSc.Mat, or a function apply(u, *parameters)"
                )
            if is_matrix and preconditioner is not None:
                raise ConfigurationError("KSPSolve: preconditioner: is for a function; a PETSc.Mat is its own")
            for name, mat in (("operator", operator), ("preconditioner", preconditioner)):
                if isinstance(mat, PETSc.Mat):
                    _check_sizes(name, mat, size)
                elif name == "preconditioner" and mat is not None:
                    raise ConfigurationError(f"KSPSolve: preconditioner = {mat!r}: must be a PETSc.Mat, or None")
            rows = _rows(nullspace, shape)
            given = dict(options or {})
            preparing.agree(
                (
                    ("kind of operator", "PETSc.Mat" if is_matrix else "function"),
                    ("symmetric", bool(symmetric)),
                    ("number of vectors in nullspace", len(rows)),
                    ("preconditioner", preconditioner is not None),
                    ("options", ", ".join(f"{name} = {value!r}" for name, value in sorted(given.items()))),
                ),
                True,
                [],
            )
        space: NullSpace | None = null_space(comm, rows) if len(rows) else None
        self.operator = MatrixFunction(operator) if isinstance(operator, PETSc.Mat) else operator
        matrix = operator if isinstance(operator, PETSc.Mat) else preconditioner
        self.krylov = KrylovSolver(comm, size, matrix, bool(symmetric), space, given)
        self._verified = False

    @property
    def iterations(self) -> int:
        """The number of iterations of all solves so far, transposed ones included."""
        return self.krylov.iterations

    @outside_graphs
    def forward(self, b: torch.Tensor, *parameters: Any) -> torch.Tensor:
        """Return x `[..., *local_shape]` for b of this shape; leading axes are solves of their own. Collective.

        `parameters` are passed on to `apply`. The result is differentiable, twice in reverse mode, with respect to b,
        the parameters, and the tensors that `apply` holds. A backward pass takes one transposed solve for each, and is
        collective. Raises `ConvergenceError` on all ranks if a solve does not converge.
        """
        partition = self.partition
        with preparation(partition.comm, "KSPSolve") as preparing:
            shape, first = tuple(partition.local_shape), b.dim() - len(partition.local_shape)
            if first < 0 or tuple(b.shape[first:]) != shape:
                raise ValueError(f"KSPSolve: got b of shape {tuple(b.shape)}, this rank owns [..., {shape}]")
            if b.dtype not in RTOL:
                raise ConfigurationError(f"KSPSolve: b: has {b.dtype}: must be torch.float64 or torch.float32")
            if transforming():
                raise ConfigurationError(
                    "KSPSolve: not available under torch's transforms or in forward mode: take a backward pass"
                )
            operator = self._operator_for(b, parameters)
            tensors = operator.parameters.tensors
            gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (b, *tensors))
            facts = (
                ("leading axes of b", tuple(b.shape[:first])),
                ("dtype", b.dtype),
                ("number of parameters with a gradient", len(tensors)),
                ("gradient", gradient),
            )
            agreed = preparing.agree(facts, False, [])
        with torch.no_grad():
            if not self._verified:
                self.krylov.verify(operator)
                operator.end()
                self._verified = True
        solve = _Solve(self.krylov, operator, tuple(partition.local_shape), agreed)
        solution: torch.Tensor = _Solution.apply(b, solve, False, *tensors)  # type: ignore[no-untyped-call]
        return solution

    def _operator_for(self, b: torch.Tensor, parameters: tuple[Any, ...]) -> _Matrix | _Function:
        if not isinstance(self.operator, MatrixFunction):
            return _Function(self.operator, parameters, tuple(self.partition.local_shape), b.dtype, b.device)
        if parameters:
            raise ConfigurationError("KSPSolve: parameters: are for a function; a PETSc.Mat has none")
        return _Matrix(self.operator)

    def extra_repr(self) -> str:
        """Return the kind of the solve for `repr`."""
        return f"symmetric={self.krylov.symmetric}"


class _Matrix:
    """The operator of a Mat, which has no parameters."""

    dtype = torch.float64
    parameters = Parameters((), False)
    held: tuple[torch.Tensor, ...] = ()

    def __init__(self, function: MatrixFunction) -> None:
        self._function = function
        self._state = function.matrix.stateGet()

    def times(self, flat: torch.Tensor) -> torch.Tensor:
        """Return A u. Collective."""
        return self._function.multiply(flat, False)

    def transposed_times(self, flat: torch.Tensor) -> torch.Tensor:
        """Return A^T u. Collective."""
        return self._function.multiply(flat, True)

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if the Mat was changed since the solve."""
        if self._function.matrix.stateGet() != self._state:
            raise RuntimeError(
                "KSPSolve: the PETSc.Mat was changed in place after a solve, and before its gradient was taken: change "
                "a copy of it"
            )

    def end(self) -> None:
        """End a solve."""


class _Function:
    """The operator of a function `apply(u, *args)`, computed in `dtype` on `device`.

    `parameters` are the tensors that it is differentiated with respect to, `held` those of its arguments.
    """

    def __init__(
        self, apply: Apply, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._apply, self._args = apply, args
        self._shape, self.dtype, self._device = shape, dtype, device
        self.parameters = independent(find_parameters(apply, args))
        self.held = tuple(arg for arg in args if isinstance(arg, torch.Tensor))
        self._check_complete = completeness_check(self.parameters)
        self._graph: tuple[torch.Tensor, torch.Tensor] | None = None

    def evaluate(self, u: torch.Tensor) -> torch.Tensor:
        """Return `apply(u)`. Collective if it is. Raises `ValueError` for a wrong shape or type."""
        image = self._apply(u, *self._args)
        if not isinstance(image, torch.Tensor) or image.shape != u.shape or image.dtype != u.dtype:
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"KSPSolve: apply returned {found}: must be like u, {u.dtype} {tuple(u.shape)}")
        if image.requires_grad:
            try:
                self._check_complete((image,), (u,))
            except ValueError:
                raise ConfigurationError(
                    "KSPSolve: apply depends on a tensor that requires a gradient and is not among its parameters: "
                    "pass it to the solve, as apply(u, tensor)"
                ) from None
        return image

    def times(self, flat: torch.Tensor) -> torch.Tensor:
        """Return A u. Collective."""
        with torch.no_grad():
            return self._flat(self.evaluate(self.part(flat)))

    def transposed_times(self, flat: torch.Tensor) -> torch.Tensor:
        """Return A^T u, by a vjp of `apply`. Collective. The graph is made once a solve."""
        if self._graph is None:
            with torch.enable_grad():
                u = torch.zeros(self._shape, dtype=self.dtype, device=self._device, requires_grad=True)
                self._graph = u, self.evaluate(u)
        u, image = self._graph
        if not image.requires_grad:
            raise ConfigurationError("KSPSolve: apply: its result must be differentiable in u: compute it by torch")
        return self._flat(torch.autograd.grad(image, u, self.part(flat), retain_graph=True)[0])

    def part(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a flat vector in the shape and type of `apply`'s u, as a copy."""
        return flat.view(self._shape).to(self._device, self.dtype, copy=True)

    def _flat(self, part: torch.Tensor) -> torch.Tensor:
        return part.detach().reshape(-1).to("cpu", vectors.scalar_dtype())

    def check_unchanged(self) -> None:
        """Nothing: torch detects changes of saved tensors."""

    def end(self) -> None:
        """End a solve, and free its graph."""
        self._graph = None


@dataclass
class _Solve:
    """The solves with one operator, and their derivatives. `shape` is that of a sample.

    `reversed`: a backward pass was taken.
    """

    krylov: KrylovSolver
    operator: _Matrix | _Function
    shape: tuple[int, ...]
    agreed: Agreed | None
    reversed: bool = False

    def solutions(self, b: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return the solution for each sample of b, outside of the graph. Collective."""
        rights = self.samples(b.detach()).to("cpu", vectors.scalar_dtype()).flatten(1)
        try:
            found = [self.krylov.solve(self.operator, right, transposed) for right in rights]
        finally:
            self.operator.end()
        return (torch.stack(found) if found else rights).view(b.shape).to(b.device, b.dtype)

    def samples(self, b: torch.Tensor) -> torch.Tensor:
        """Return b as `[sample, *shape]`."""
        return b.reshape(math.prod(b.shape[: b.dim() - len(self.shape)]), *self.shape)

    def begin_backward(self) -> None:
        """Begin a backward pass. Collective."""
        if self.agreed is not None:
            self.agreed.begin_backward(self.reversed)
        self.reversed = True
        self.operator.check_unchanged()

    def parameter_gradients(
        self, u: list[torch.Tensor], v: list[torch.Tensor], create_graph: bool
    ) -> list[torch.Tensor]:
        """Return the gradient of -<v, A u>, summed over pairs, for each parameter. Collective if `apply` is."""
        assert isinstance(self.operator, _Function)
        tensors = self.operator.parameters.tensors
        forms = [-(one * self.operator.evaluate(other)).sum() for other, one in zip(u, v, strict=True)]
        if not forms:
            return [torch.zeros_like(tensor) for tensor in tensors]
        found = torch.autograd.grad(
            torch.stack(forms).sum(), tensors, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


class _Solution(torch.autograd.Function):
    """x = A^-1 b, or A^-T b if `transposed`. With x' = A^-T w, <w, dx> = <x', db> - <x', dA x>."""

    @staticmethod
    def forward(b: torch.Tensor, solve: _Solve, transposed: bool, *tensors: torch.Tensor) -> torch.Tensor:
        return solve.solutions(b, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.solve, ctx.transposed, *tensors = inputs
        ctx.save_for_backward(output, *tensors, *ctx.solve.operator.held)
        ctx.count = len(tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        solve, tensors = ctx.solve, ctx.saved_tensors[1 : 1 + ctx.count]
        x = ctx.saved_tensors[0]
        solve.begin_backward()
        other = _Solution.apply(cotangents[0], solve, not ctx.transposed, *tensors)  # type: ignore[no-untyped-call]
        gradients: tuple[Any, ...] = (None,) * ctx.count
        if any(ctx.needs_input_grad[3:]):
            u, v = (other, x) if ctx.transposed else (x, other)
            gradients = _ParameterGradients.apply(u, v, solve, *tensors)  # type: ignore[no-untyped-call]
        return other, None, None, *gradients


class _ParameterGradients(torch.autograd.Function):
    """The gradients of -<v, A u> with respect to the parameters of A."""

    @staticmethod
    def forward(u: torch.Tensor, v: torch.Tensor, solve: _Solve, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            every_u, every_v = [*solve.samples(u.detach())], [*solve.samples(v.detach())]
            return tuple(solve.parameter_gradients(every_u, every_v, create_graph=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        u, v, ctx.solve, *tensors = inputs
        ctx.save_for_backward(u, v, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        u, v, *tensors = ctx.saved_tensors
        solve = ctx.solve
        # Leaves, so that the derivatives of A end there.
        every_u, every_v = ([part.detach().requires_grad_() for part in solve.samples(x)] for x in (u, v))
        with torch.enable_grad():
            first = solve.parameter_gradients(every_u, every_v, create_graph=True)
            weighted = torch.stack([(c * g).sum() for c, g in zip(cotangents, first, strict=True)]).sum()
        if not weighted.requires_grad:
            return (None,) * (3 + len(tensors))
        inputs = (*every_u, *every_v, *solve.operator.parameters.tensors)
        given = torch.autograd.grad(weighted, inputs, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True)]
        count = len(every_u)
        second = (torch.stack(found[start : start + count]).view(u.shape) for start in (0, count))
        return *second, None, *found[2 * count :]


def _check_sizes(name: str, matrix: PETSc.Mat, size: int) -> None:
    rows, columns = matrix.getLocalSize()
    if (rows, columns) != (size, size):
        raise ConfigurationError(
            f"KSPSolve: {name}: has {rows} rows and {columns} columns on this rank, whose part of the state has {size} "
            "entries: must have the partition's row distribution"
        )


def _rows(given: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the vectors of a null space as rows `[vector, entry]`."""
    dtype = vectors.scalar_dtype()
    if given is None:
        return torch.empty(0, math.prod(shape), dtype=dtype)
    if isinstance(given, str):
        if given != "constant":
            raise ConfigurationError(f"KSPSolve: nullspace = {given!r}: must be 'constant', vectors, or None")
        return torch.ones(1, math.prod(shape), dtype=dtype)
    rows = list(given)
    for number, row in enumerate(rows):
        if not isinstance(row, torch.Tensor) or tuple(row.shape) != shape:
            found = tuple(row.shape) if isinstance(row, torch.Tensor) else type(row).__name__
            raise ConfigurationError(f"KSPSolve: nullspace[{number}]: has {found}: must be a tensor of {shape}")
    return torch.stack([row.detach().to("cpu", dtype).reshape(-1) for row in rows]) if rows else _rows(None, shape)
