"""Linear solves as layers are dense solves, with their gradients, at every number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from petsc4py import PETSc

from pnode_dist import (
    ConfigurationError,
    ConvergenceError,
    DensePartition,
    DisagreementError,
    GridPartition,
    Mesh,
    NeuralODE,
)
from pnode_dist.exchange import gather_vector, halo
from pnode_dist.nn import KSPSolve, Poisson
from tests.mpi.test_agreement import raised_on_all
from tests.oracles.elliptic import diffusion, matrix_of, solved
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

D = torch.float64
SIZE = 12
EXACT = {"ksp_rtol": 1e-12}


def distributed(partition: DensePartition, whole: torch.Tensor) -> PETSc.Mat:
    """A Mat of the rows of `whole` that ranks own."""
    rows = partition.local_shape[0]
    matrix = PETSc.Mat().createAIJ(((rows, None), (rows, None)), nnz=whole.shape[1], comm=partition.comm)
    start, stop = matrix.getOwnershipRange()
    columns = range(whole.shape[1])
    for row in range(start, stop):
        matrix.setValues(row, list(columns), whole[row].tolist())
    matrix.assemble()
    return matrix


def regular(symmetric: bool) -> torch.Tensor:
    whole = 0.3 * random(SIZE, SIZE) + 4 * torch.eye(SIZE, dtype=D)
    return whole @ whole.T if symmetric else whole


class Coupled:
    """A u = s u + k^2 W (k u), with parameters k and s: dense, not symmetric, and not linear in its parameters."""

    def __init__(self, partition: DensePartition) -> None:
        self.partition = partition
        self.weight = 0.1 * random(SIZE, SIZE, seed=5)
        self.rows = partition.scatter(self.weight.T.contiguous()).T if partition.comm.size > 1 else self.weight

    def __call__(self, u: torch.Tensor, k: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return s * u + k.square() * (self.rows.to(u) @ gather_vector(k * u, self.partition))

    def whole(self, k: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return s * torch.eye(SIZE, dtype=D) + k.square()[:, None] * self.weight * k


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_mat_and_its_gradient_are_dense_solves(symmetric: bool, mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    whole = regular(symmetric)
    solve = KSPSolve(distributed(partition, whole), partition, symmetric=symmetric, options=EXACT)
    right, weight = random(2, 3, SIZE), random(2, 3, SIZE, seed=2)
    b = partition.scatter(right).requires_grad_()
    x = solve(b)
    (gradient,) = torch.autograd.grad((partition.scatter(weight) * x).sum(), b)
    assert distance(x, partition.scatter(right @ torch.linalg.inv(whole).T)) <= 1e-10
    assert distance(gradient, partition.scatter(weight @ torch.linalg.inv(whole))) <= 1e-10
    assert solve.iterations > 0


def test_first_and_second_gradients_of_a_function_are_dense_ones(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    apply = Coupled(partition)
    solve = KSPSolve(apply, partition, options=EXACT)
    given = random(2, SIZE), 1 + random(SIZE, seed=3).square() / 4, torch.tensor(3.0, dtype=D)
    weight = random(2, SIZE, seed=4)

    def derivatives(inputs: list[torch.Tensor], local: bool) -> tuple[Any, ...]:
        b, k, s = inputs
        x = solve(b, k, s) if local else torch.linalg.solve(apply.whole(k, s), b.T).T
        w = partition.scatter(weight) if local else weight
        first = torch.autograd.grad((w * torch.sin(x)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad((first[0] * torch.cos(b)).sum() + (first[1] * torch.sin(k)).sum(), inputs)
        return x.detach(), *(part.detach() for part in (*first, *second))

    wanted = derivatives([part.clone().requires_grad_() for part in given], False)
    local = [partition.scatter(given[0]), partition.scatter(given[1]), given[2].clone()]
    found = derivatives([part.requires_grad_() for part in local], True)
    tolerances = (1e-10, *[1e-9] * 6)
    for number, (one, other, tolerance) in enumerate(zip(found, wanted, tolerances, strict=True)):
        is_number = number in (3, 6)
        assert distance(mesh.sum(one) if is_number else one, other if is_number else partition.scatter(other)) <= (
            tolerance
        )


def test_tensors_that_a_function_holds_get_their_gradients(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    shift = torch.nn.Parameter(torch.tensor(2.0, dtype=D))
    x = KSPSolve(lambda u: shift * u, partition, symmetric=True, options=EXACT)(
        torch.ones(partition.local_shape).double()
    )
    (gradient,) = torch.autograd.grad(x.sum(), shift)
    assert abs(mesh.sum(gradient).item() + SIZE / 4) <= 1e-12


def test_single_precision_and_a_preconditioning_mat_reach_the_stated_tolerance(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    diagonal = torch.arange(1, SIZE + 1, dtype=torch.float32).square()
    own, right = partition.scatter(diagonal), random(SIZE, dtype=torch.float32)
    near = distributed(partition, torch.diag(diagonal.double()))
    plain = KSPSolve(lambda u: own * u, partition, symmetric=True)
    helped = KSPSolve(lambda u: own * u, partition, symmetric=True, preconditioner=near, options={"pc_type": "jacobi"})
    for solve in (plain, helped):
        x = solve(partition.scatter(right))
        assert x.dtype == torch.float32
        rest = partition.scatter(right) - own * x
        assert mesh.sum(rest.square().sum()).sqrt() <= 2e-5 * right.norm()
    assert helped.iterations <= 2 < 5 <= plain.iterations


def test_a_null_space_is_taken_out_of_right_hand_side_and_solution(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (16,), boundary="periodic")

    def upwind(u: torch.Tensor) -> torch.Tensor:
        below, here, above = (halo(u, partition, 1)[start : start + len(u)] for start in range(3))
        return 3 * here - 2 * below - above

    def whole(u: torch.Tensor) -> torch.Tensor:
        return 3 * u - 2 * u.roll(1) - u.roll(-1)

    right = 1e3 + random(16, 1)
    wanted = solved(matrix_of(whole, (16,)), right, singular=True)
    for nullspace in ("constant", [torch.full(partition.local_shape, -3.0)]):
        solve = KSPSolve(upwind, partition, nullspace=nullspace, options=EXACT)
        assert distance(solve(partition.scatter(right)), partition.scatter(wanted)) <= 1e-10


CASES = [
    (("periodic", "replicate"), 0.0),
    (("zero", 1.5), 0.3),
    (("replicate", "zero"), 0.0),
    (("periodic",), 0.3),
    (("periodic", "replicate", -2.0), 0.0),
]


@pytest.mark.parametrize(("boundary", "c"), CASES)
def test_poisson_s_solutions_and_gradients_are_dense_ones(boundary: tuple[Any, ...], c: float, mesh: Mesh) -> None:
    shape, spacing = (4, 6, 5)[: len(boundary)], (0.5, 0.7, 0.9)[: len(boundary)]
    partition = GridPartition(mesh, shape, channels=2, boundary=boundary)
    k, right, weight = 1 + random(*shape).square(), random(*shape, 2, seed=2), random(*shape, 2, seed=3)

    def local(field: torch.Tensor) -> torch.Tensor:
        return partition.scatter(field[..., None].expand(*shape, 2).contiguous())[..., 0].clone()

    whole_k, whole_b = k.clone().requires_grad_(), right.clone().requires_grad_()
    homogeneous = ["zero" if isinstance(rule, float) else rule for rule in boundary]
    matrix = matrix_of(lambda u: diffusion(u, whole_k, c, homogeneous, spacing), shape)
    beyond = diffusion(torch.zeros(shape, dtype=D), whole_k, c, boundary, spacing)
    singular = c == 0.0 and set(boundary) <= {"periodic", "replicate"}
    wanted = solved(matrix, (whole_b - beyond[..., None]).reshape(-1, 2), singular).view(*shape, 2)
    of_b, of_k = torch.autograd.grad((weight * wanted).sum(), (whole_b, whole_k))
    b, own = partition.scatter(right).requires_grad_(), local(k).requires_grad_()

    u = Poisson(partition, spacing=spacing, k=own.detach(), c=c, options=EXACT)(b)
    (gradient,) = torch.autograd.grad((partition.scatter(weight) * u).sum(), b)
    assert distance(u, partition.scatter(wanted)) <= 1e-10
    assert distance(gradient, partition.scatter(of_b)) <= 1e-9

    u = Poisson(partition, spacing=spacing, k=None, c=c, options=EXACT)(b, own)
    found = torch.autograd.grad((partition.scatter(weight) * u).sum(), (b, own))
    assert distance(u, partition.scatter(wanted)) <= 1e-10
    assert distance(found[0], partition.scatter(of_b)) <= 1e-9
    assert distance(found[1], local(of_k)) <= 1e-9


@pytest.mark.parametrize("rule", ["zero", "replicate", "periodic"])
def test_poisson_converges_in_second_order_to_the_known_solution(rule: str, mesh: Mesh) -> None:
    wave = 2 * math.pi if rule == "periodic" else math.pi

    def error(cells: int) -> float:
        points = cells - 1 if rule == "zero" else cells
        x = (torch.arange(points, dtype=D) + (1.0 if rule == "zero" else 0.5)) / cells
        u, slope = (x * wave).cos(), -wave * (x * wave).sin()
        if rule == "zero":
            u, slope = (x * wave).sin(), wave * (x * wave).cos()
        k, slope_of_k = 1 + x, torch.ones(points, dtype=D)
        if rule == "periodic":
            k, slope_of_k = 2 + (x * wave).sin(), wave * (x * wave).cos()
        b = k * wave**2 * u - slope_of_k * slope
        partition = GridPartition(mesh, (points,), boundary=rule)
        b, k, u = (partition.scatter(field[:, None]) for field in (b, k, u))
        found = Poisson(partition, spacing=1 / cells, k=k[:, 0])(b)
        # The solution of mean 0 is that of the points.
        return math.sqrt(mesh.sum((found - u).square().sum()).item() / cells)

    assert 1.9 <= math.log2(error(64) / error(128)) <= 2.1


def test_a_solve_inside_a_right_hand_side_has_the_dense_gradient(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (12,), boundary="zero")
    poisson = Poisson(partition, k=None, c=0.5, options=EXACT)
    whole_k = (1 + random(12).square()).requires_grad_()
    k = torch.nn.Parameter(partition.scatter(whole_k.detach()[:, None])[:, 0].clone())
    u0 = random(12, 1, seed=2)

    def slope(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u.pow(3) + poisson(u, k)

    times = torch.tensor([0.0, 0.2, 0.4], dtype=D)
    ode = NeuralODE(slope, method="midpoint", partition=partition)
    u = ode(partition.scatter(u0), times)[-1]
    (gradient,) = torch.autograd.grad(u.square().sum(), k)

    matrix = matrix_of(lambda u: diffusion(u, whole_k, 0.5, ["zero"], [1.0]), (12,))
    wanted = u0
    for _ in range(2):
        middle = wanted + 0.1 * (-wanted.pow(3) + torch.linalg.solve(matrix, wanted))
        wanted = wanted + 0.2 * (-middle.pow(3) + torch.linalg.solve(matrix, middle))
    (of_k,) = torch.autograd.grad(wanted.square().sum(), whole_k)
    assert distance(u.detach(), partition.scatter(wanted.detach())) <= 1e-10
    assert distance(gradient, partition.scatter(of_k[:, None])[:, 0]) <= 1e-9


def test_a_solve_that_does_not_converge_is_an_error_on_all_ranks(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    b = torch.ones(partition.local_shape, dtype=D, requires_grad=True)
    short = KSPSolve(distributed(partition, regular(True)), partition, options={"ksp_max_it": 1, "pc_type": "none"})
    text = raised_on_all(ConvergenceError, lambda: short(b))
    assert "not solved to ksp_rtol = 1e-10: DIVERGED_MAX_IT after 1 iterations" in text

    # One iteration is enough for b along an eigenvector, and not for the cotangent.
    _, modes = torch.linalg.eigh(regular(True))
    x = short(partition.scatter(modes[:, 0].contiguous()).requires_grad_())
    text = raised_on_all(ConvergenceError, lambda: x.sum().backward())
    assert "the transposed linear system was not solved" in text


def test_a_residual_that_the_norm_of_the_method_hides_is_an_error(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    diagonal = torch.arange(1, SIZE + 1, dtype=D)
    diagonal[-1] = 1e30
    settings = {"ksp_type": "gmres", "ksp_pc_side": "left", "pc_type": "jacobi"}
    near = distributed(partition, torch.diag(diagonal))
    solve = KSPSolve(lambda u: 2 * u, partition, preconditioner=near, options=settings)
    text = raised_on_all(ConvergenceError, lambda: solve(torch.ones(partition.local_shape, dtype=D)))
    assert "the residual of the linear system is 1" in text


def test_an_error_of_the_function_comes_out_of_petsc_as_it_is(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    calls: list[int] = []

    def failing(u: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise ZeroDivisionError("in apply")
        return 2 * u

    solve = KSPSolve(failing, partition)
    assert raised_on_all(ZeroDivisionError, lambda: solve(torch.ones(partition.local_shape, dtype=D))) == "in apply"


class Hidden:
    """An object whose attributes no search finds."""

    __slots__ = ("factor",)


def test_a_tensor_that_a_function_hides_is_refused(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    hidden = Hidden()
    hidden.factor = torch.tensor(2.0, dtype=D, requires_grad=True)
    b = torch.ones(partition.local_shape, dtype=D, requires_grad=True)
    solve = KSPSolve(lambda u: hidden.factor * u, partition)
    text = raised_on_all(ConfigurationError, lambda: solve(b).sum().backward())
    assert "requires a gradient and is not among its parameters" in text


def test_forward_mode_and_transforms_are_refused_by_name(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    solve = KSPSolve(lambda u: 2 * u, partition)
    b = torch.ones(partition.local_shape, dtype=D)
    assert "KSPSolve: not available" in raised_on_all(ConfigurationError, lambda: torch.func.vjp(solve, b))


def test_arguments_for_a_function_are_refused_for_a_mat(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    matrix = distributed(partition, regular(True))
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("preconditioner: is for a function", lambda: KSPSolve(matrix, partition, preconditioner=matrix)),
        ("parameters: are for a function", lambda: KSPSolve(matrix, partition)(torch.ones(partition.local_shape), 1.0)),
        ("must have the partition's row distribution", lambda: KSPSolve(matrix, DensePartition(mesh, 2 * SIZE))),
    ]
    for words, action in wrong:
        with pytest.raises(ConfigurationError, match=words):
            action()


@pytest.mark.parametrize(
    ("operator", "settings", "words"),
    [
        (lambda u: u + 1, {}, "must be linear in u"),
        (lambda u: u.square(), {}, "must be linear in u"),
        (lambda u: 2 * u, {"nullspace": "constant"}, "nullspace[0]: A times this vector must be 0"),
        (lambda u: u, {"options": {"ksp_rtoll": 1e-3}}, "did you mean ksp_rtol?"),
        (lambda u: u, {"options": {"ksp_type": "unknown"}}, "unknown"),
        (lambda u: u, {"options": {"pc_type": "jacobi"}}, "give preconditioner="),
        (lambda u: u, {"nullspace": "linear"}, "must be 'constant', vectors, or None"),
        (3.0, {}, "must be a PETSc.Mat, or a function"),
    ],
)
def test_a_wrong_operator_or_option_is_one_line_on_all_ranks(
    operator: Any, settings: dict[str, Any], words: str, mesh: Mesh
) -> None:
    partition = DensePartition(mesh, SIZE)
    b = torch.ones(partition.local_shape, dtype=D)
    assert words in raised_on_all(ConfigurationError, lambda: KSPSolve(operator, partition, **settings)(b))


def test_a_function_that_is_not_symmetric_as_stated_is_refused(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    apply = Coupled(partition)
    solve = KSPSolve(apply, partition, symmetric=True)
    b, s = torch.ones(partition.local_shape, dtype=D), torch.tensor(3.0, dtype=D)
    assert "symmetric = True" in raised_on_all(ConfigurationError, lambda: solve(b, b, s))


def test_ranks_that_disagree_on_a_gradient_hear_of_it(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    solve = KSPSolve(lambda u: 2 * u, partition)
    b = torch.ones(partition.local_shape, dtype=D, requires_grad=mesh.state_comm.rank == 0)
    if mesh.state_comm.size > 1:
        assert "gradient" in raised_on_all(DisagreementError, lambda: solve(b))
    assert distance(solve(b.detach()), b.detach() / 2) <= 1e-10


def test_a_mat_that_was_changed_before_its_gradient_is_an_error(mesh: Mesh) -> None:
    partition = DensePartition(mesh, SIZE)
    matrix = distributed(partition, regular(True))
    x = KSPSolve(matrix, partition)(torch.ones(partition.local_shape, dtype=D, requires_grad=True))
    matrix.scale(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        x.sum().backward()


@pytest.mark.parametrize(
    ("boundary", "settings", "words"),
    [
        ("reflect", {}, "boundary of x = 'reflect'"),
        ("zero", {"k": 0.0}, "k: must be finite and positive"),
        ("zero", {"c": -1.0}, "c: must be finite and at least 0"),
        ("zero", {"spacing": (1.0, 1.0)}, "spacing = (1.0, 1.0)"),
        ("zero", {"c": torch.nn.Parameter(torch.ones(()))}, "c: requires a gradient"),
    ],
)
def test_a_wrong_argument_of_poisson_is_one_line(
    boundary: str, settings: dict[str, Any], words: str, mesh: Mesh
) -> None:
    partition = GridPartition(mesh, (8,), boundary=boundary)
    assert words in raised_on_all(ConfigurationError, lambda: Poisson(partition, **settings))
