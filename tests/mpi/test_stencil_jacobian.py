"""The Jacobian of a stencil operator as a matrix: entry by entry, at any number of ranks, and to solve with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import Conv2d
from pnode_dist.partition.stencil_jacobian import StencilJacobian
from pnode_dist.petsc import vectors
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.stencils import stencil_matrix

pytestmark = pytest.mark.mpi

Product = Callable[[torch.Tensor], torch.Tensor]


def state_shape(partition: GridPartition, leading: tuple[int, ...]) -> tuple[int, ...]:
    """This rank's part of a state with leading axes."""
    return (*leading, *partition.local_shape)


def natural_numbers(partition: GridPartition, leading: tuple[int, ...]) -> torch.Tensor:
    """For every row of the Vec, of all ranks, its number in the whole `[*leading, ny, nx, channels]` array."""
    whole = torch.arange(math.prod(leading) * math.prod(partition.global_shape))
    local = partition.scatter(whole.view(*leading, *partition.global_shape))
    return torch.cat(partition.comm.allgather(local.reshape(-1)))


def dense(matrix: PETSc.Mat, partition: GridPartition, leading: tuple[int, ...]) -> torch.Tensor:
    """The matrix on every rank, renumbered as the whole array is."""
    starts, columns, values = matrix.getValuesCSR()
    rows = torch.zeros(len(starts) - 1, matrix.getSize()[1], dtype=torch.float64)
    row = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    rows[row, columns.astype(np.int64)] = torch.from_numpy(values)
    numbers = natural_numbers(partition, leading)
    renumbered = torch.empty(len(numbers), len(numbers), dtype=torch.float64)
    renumbered[numbers[:, None], numbers] = torch.cat(partition.comm.allgather(rows))
    return renumbered


def product_with(whole: torch.Tensor, partition: GridPartition, leading: tuple[int, ...]) -> Product:
    """The collective product of a whole matrix with a vector that is spread over the ranks."""
    numbers = natural_numbers(partition, leading)

    def jvp(v: torch.Tensor) -> torch.Tensor:
        spread = torch.empty(len(numbers), dtype=torch.float64)
        spread[numbers] = torch.cat(partition.comm.allgather(v))
        return partition.scatter((whole @ spread).view(*leading, *partition.global_shape)).reshape(-1)

    return jvp


def gathered(vec: PETSc.Vec, partition: GridPartition, leading: tuple[int, ...]) -> torch.Tensor:
    """All entries of a Vec, numbered as the whole array is."""
    spread = torch.cat(partition.comm.allgather(vectors.view(vec, (vec.getLocalSize(),)).clone()))
    whole = torch.empty_like(spread)
    whole[natural_numbers(partition, leading)] = spread
    return whole


@pytest.mark.parametrize("boundary", [("periodic", "periodic"), ("replicate", "periodic"), ("zero", "replicate")])
@pytest.mark.parametrize("shape", [(7, 9), (11, 5), (4, 4)])
@pytest.mark.parametrize("width", [0, 1, 2, (1, 3), (4, 0)])
def test_every_entry_of_a_stencil_s_matrix_is_found_exactly(
    boundary: tuple[str, str], shape: tuple[int, int], width: int | tuple[int, int], mesh: Mesh
) -> None:
    for channels, leading in ((1, ()), (2, (2,))):
        partition = GridPartition(mesh, shape, channels=channels, boundary=boundary)
        whole = stencil_matrix(shape, channels, math.prod(leading), width, boundary, seed=1)
        jacobian = StencilJacobian(partition, width, state_shape(partition, leading))
        matrix = jacobian.assemble(product_with(whole, partition, leading), 0.0)
        assert torch.equal(dense(matrix, partition, leading), -whole)
        # Nothing is stored that the stencil does not reach.
        assert matrix.getInfo(PETSc.Mat.InfoType.GLOBAL_SUM)["nz_used"] == int((whole != 0).sum())


@pytest.mark.parametrize(
    ("shape", "boundary", "width"),
    [
        ((17,), ("periodic",), 2),
        ((17,), ("reflect",), 3),
        ((4, 4, 5), ("periodic", "zero", "periodic"), 1),
        ((4, 5, 4), ("replicate", "periodic", "zero"), (2, 1, 0)),
    ],
    ids=str,
)
def test_every_entry_is_found_on_grids_of_one_and_three_axes(
    shape: tuple[int, ...], boundary: tuple[str, ...], width: int | tuple[int, ...], mesh: Mesh
) -> None:
    for channels, leading in ((1, (2,)), (2, ())):
        partition = GridPartition(mesh, shape, channels=channels, boundary=boundary)
        whole = stencil_matrix(shape, channels, math.prod(leading), width, boundary, seed=1)
        jacobian = StencilJacobian(partition, width, state_shape(partition, leading))
        matrix = jacobian.assemble(product_with(whole, partition, leading), 0.0)
        assert torch.equal(dense(matrix, partition, leading), -whole)
        assert matrix.getInfo(PETSc.Mat.InfoType.GLOBAL_SUM)["nz_used"] == int((whole != 0).sum())


@dataclass(frozen=True)
class Network:
    """Two convolutions with a nonlinearity between, split over ranks and whole, and how far they reach."""

    partition: GridPartition
    layers: tuple[Conv2d, ...]

    @property
    def width(self) -> tuple[int, int]:
        """The reach of the whole stack."""
        wy, wx = (sum(layer.halo_width[axis] for layer in self.layers) for axis in (0, 1))
        return wy, wx

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            u = layer(torch.tanh(u) if number else u)
        return u

    def product(self, u: torch.Tensor) -> Product:
        """J v at this rank's part `u`, flat."""

        def jvp(v: torch.Tensor) -> torch.Tensor:
            tangent: torch.Tensor = torch.func.jvp(self, (u,), (v.view(u.shape),))[1]
            return tangent.reshape(-1)

        return jvp

    def whole_matrix(self, u: torch.Tensor) -> torch.Tensor:
        """The dense Jacobian at the whole field `u`, by rows."""

        def whole(field: torch.Tensor) -> torch.Tensor:
            batch = field.reshape(-1, *field.shape[-3:])
            for number, layer in enumerate(self.layers):
                batch = torch.tanh(batch) if number else batch
                batch = convolved(batch, self.partition.boundary, layer.weight, layer.bias, layer.dilation)
            return batch.view(field.shape)

        jacobian = torch.autograd.functional.jacobian(whole, u)
        assert isinstance(jacobian, torch.Tensor)
        return jacobian.detach().reshape(u.numel(), u.numel())


def network(
    place: Mesh | MPI.Comm,
    shape: tuple[int, int],
    boundary: tuple[str, str],
    channels: int = 2,
    kernels: tuple[tuple[int, int], ...] = ((3, 3), (3, 3)),
) -> Network:
    """A network with the same weights wherever it is made."""
    partition = GridPartition(place, shape, channels=channels, boundary=boundary)
    torch.manual_seed(5)
    sizes = [channels, *[3] * (len(kernels) - 1), channels]
    layers = (
        Conv2d(partition, before, after, kernel, dtype=torch.float64)
        for before, after, kernel in zip(sizes, sizes[1:], kernels, strict=False)
    )
    return Network(partition, tuple(layers))


CASES: list[dict[str, Any]] = [
    {"shape": (7, 9), "boundary": ("periodic", "replicate")},
    {"shape": (10, 10), "boundary": ("periodic", "periodic")},
    {"shape": (9, 8), "boundary": ("replicate", "replicate"), "channels": 1, "kernels": ((3, 3), (1, 3))},
    {"shape": (8, 7), "boundary": ("zero", "periodic"), "channels": 3, "kernels": ((3, 1),)},
    # As far as these reach, around both ends and beyond every block, all points see each other.
    {"shape": (5, 6), "boundary": ("periodic", "periodic"), "kernels": ((3, 3), (3, 3), (3, 3))},
    {"shape": (4, 5), "boundary": ("replicate", "periodic"), "channels": 1, "kernels": ((3, 3),) * 4},
]


@pytest.mark.parametrize("leading", [(), (2, 1)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['shape']}")
def test_the_matrix_of_a_network_is_its_dense_jacobian(
    case: dict[str, Any], leading: tuple[int, ...], mesh: Mesh
) -> None:
    net = network(mesh, **case)
    partition = net.partition
    u = random(*leading, *partition.global_shape)
    local = partition.scatter(u)
    jacobian = StencilJacobian(partition, net.width, local.shape)
    matrix = jacobian.assemble(net.product(local), 3.0)
    wanted = 3.0 * torch.eye(u.numel(), dtype=torch.float64) - net.whole_matrix(u)
    assert distance(dense(matrix, partition, leading), wanted) <= 1e-14


def test_a_mass_weights_the_diagonal(mesh: Mesh) -> None:
    net = network(mesh, (7, 9), ("periodic", "replicate"))
    partition = net.partition
    u, mass = random(2, *partition.global_shape), random(2, *partition.global_shape, seed=7)
    mass[..., 0] = 0  # algebraic rows
    local = partition.scatter(u)
    jacobian = StencilJacobian(partition, net.width, local.shape)
    matrix = jacobian.assemble(net.product(local), 3.0, mass=partition.scatter(mass).reshape(-1))
    wanted = torch.diag(3.0 * mass.reshape(-1)) - net.whole_matrix(u)
    assert distance(dense(matrix, partition, (2,)), wanted) <= 1e-14


def test_the_same_matrix_is_filled_again(mesh: Mesh) -> None:
    net = network(mesh, (7, 9), ("periodic", "replicate"))
    partition = net.partition
    jacobian = StencilJacobian(partition, net.width)
    handles = set()
    for seed, shift in ((1, 0.5), (2, -4.0)):
        u = random(*partition.global_shape, seed=seed)
        matrix = jacobian.assemble(net.product(partition.scatter(u)), shift)
        handles.add(matrix.handle)
        wanted = shift * torch.eye(u.numel(), dtype=torch.float64) - net.whole_matrix(u)
        assert distance(dense(matrix, partition, ()), wanted) <= 1e-14
    assert len(handles) == 1


@pytest.mark.parametrize("leading", [(), (4,)])
def test_a_product_is_taken_for_each_colour_and_channel_whatever_the_samples(
    leading: tuple[int, ...], mesh: Mesh
) -> None:
    net = network(mesh, (10, 15), ("periodic", "periodic"))
    local = net.partition.scatter(random(*leading, *net.partition.global_shape))
    jvp, calls = net.product(local), 0

    def counted(v: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert v.dtype == torch.float64
        assert v.shape == (local.numel(),)
        return jvp(v)

    jacobian = StencilJacobian(net.partition, net.width, local.shape)
    assert net.width == (2, 2)
    jacobian.assemble(counted, 1.0)
    # A box of 5 x 5 points and multiples of 5, two channels.
    assert calls == jacobian.products == 25 * 2


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: f"{case['shape']}")
def test_the_matrix_does_not_depend_on_the_number_of_ranks(case: dict[str, Any], mesh: Mesh) -> None:
    here, alone = network(mesh, **case), network(MPI.COMM_SELF, **case)
    u = random(3, *here.partition.global_shape)
    matrices = []
    for net in (here, alone):
        local = net.partition.scatter(u)
        jacobian = StencilJacobian(net.partition, net.width, local.shape)
        matrices.append(dense(jacobian.assemble(net.product(local), 2.0), net.partition, (3,)))
    assert torch.equal(matrices[0] != 0, matrices[1] != 0)
    assert distance(matrices[0], matrices[1]) <= 1e-14


@pytest.mark.parametrize(
    "options",
    [
        {"pc_type": "bjacobi", "sub_pc_type": "ilu"},
        {"pc_type": "asm", "sub_pc_type": "ilu", "pc_asm_overlap": 2},
        {"pc_type": "asm", "sub_pc_type": "lu", "pc_asm_type": "basic"},
        {"pc_type": "gamg"},
        {"pc_type": "gamg", "mg_levels_pc_type": "jacobi", "mg_levels_ksp_type": "richardson"},
        {"pc_type": "ilu"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_petsc_s_preconditioners_solve_with_it(options: dict[str, Any], transposed: bool, mesh: Mesh) -> None:
    # An incomplete factorisation of a matrix that is spread over ranks is not PETSc's.
    if options["pc_type"] == "ilu" and mesh.size > 1:
        options = {"pc_type": "bjacobi", "sub_pc_type": "ilu", "sub_pc_factor_levels": 1}
    partition = GridPartition(mesh, (16, 20), channels=2, boundary=("periodic", "replicate"))
    jvp = diffusion(partition)
    matrix = StencilJacobian(partition, 1).assemble(jvp, 1.0)
    right = partition.scatter(random(*partition.global_shape))
    rhs, solution = partition.create_vec(), partition.create_vec()
    partition.view(rhs).copy_(right)
    rhs.stateIncrease()
    iterations = {}
    for name, chosen in (("none", {"pc_type": "none"}), ("chosen", options)):
        ksp = PETSc.KSP().create(partition.comm)
        ksp.setOperators(matrix)
        set_options(
            ksp, {"ksp_type": "gmres", "ksp_gmres_restart": 200, "ksp_rtol": 1e-11, "ksp_max_it": 400, **chosen}
        )
        solution.set(0)
        (ksp.solveTranspose if transposed else ksp.solve)(rhs, solution)
        assert ksp.getConvergedReason() > 0, name
        iterations[name] = ksp.getIterationNumber()
        whole = dense(matrix, partition, ())
        wanted = torch.linalg.solve(whole.T if transposed else whole, gathered(rhs, partition, ()))
        assert distance(gathered(solution, partition, ()), wanted) <= 1e-8
        ksp.destroy()
    assert iterations["chosen"] < iterations["none"] / 2


def diffusion(partition: GridPartition) -> Product:
    """J v of two species that diffuse at different speeds, drift and react: not symmetric, and stiff."""
    centre, sides = 1.0, 0.0
    kernel = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for species, speed in enumerate((40.0, 10.0)):
        kernel[species, species, [0, 1, 1, 2], [1, 0, 2, 1]] = speed
        kernel[species, species, 1, 1] = -4 * speed
        kernel[species, species, 1, 2] += 0.3 * speed
        kernel[species, species, 1, 0] -= 0.3 * speed
    kernel[0, 1, 1, 1], kernel[1, 0, 1, 1] = -3.0 + sides, 2.0 * centre
    layer = Conv2d(partition, 2, 2, bias=False, dtype=torch.float64)
    layer.weight.data = kernel

    def jvp(v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return layer(v.view(partition.local_shape)).reshape(-1)

    return jvp


def set_options(ksp: PETSc.KSP, options: dict[str, Any]) -> None:
    """Give a solver PETSc options of its own."""
    database, prefix = PETSc.Options(), "stencil_jacobian_"
    for name, value in options.items():
        database.setValue(prefix + name, value)
    ksp.setOptionsPrefix(prefix)
    ksp.setFromOptions()
    for name in options:
        database.delValue(prefix + name)


def test_its_blocks_are_the_channels(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (7, 9), channels=3)
    matrix = StencilJacobian(partition, 1, (2, *partition.local_shape)).matrix
    assert matrix.getBlockSize() == 3
    assert matrix.getLocalSize() == (2 * math.prod(partition.local_shape),) * 2
    assert matrix.getType() in ("seqaij", "mpiaij")


def test_a_state_may_have_other_channels_than_its_partition(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (7, 9), channels=1)
    wide = GridPartition(mesh, (7, 9), channels=4)
    whole = stencil_matrix((7, 9), 4, 1, 1, wide.boundary, seed=1)
    matrix = StencilJacobian(partition, 1, wide.local_shape).assemble(product_with(whole, wide, ()), 0.0)
    assert torch.equal(dense(matrix, wide, ()), -whole)


def test_a_state_without_samples_has_an_empty_matrix(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (7, 9))
    matrix = StencilJacobian(partition, 1, (0, *partition.local_shape)).assemble(lambda v: v, 1.0)
    assert matrix.getSize() == (0, 0)


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: f"{case['shape']}")
def test_a_width_that_is_too_small_shows(case: dict[str, Any], mesh: Mesh) -> None:
    net = network(mesh, **case)
    jvp = net.product(net.partition.scatter(random(*net.partition.global_shape)))
    mass = 1 + net.partition.scatter(random(*net.partition.global_shape, seed=9)).square().reshape(-1)
    enough = StencilJacobian(net.partition, net.width)
    enough.assemble(jvp, 2.0, mass)
    assert enough.missed(jvp, 2.0, mass) <= 1e-14
    short = StencilJacobian(net.partition, (net.width[0] - 1, net.width[1]))
    short.assemble(jvp, 2.0, mass)
    found = short.missed(jvp, 2.0, mass)
    assert found > 1e-2
    assert len(set(mesh.state_comm.allgather(found))) == 1


def test_shapes_that_do_not_fit_are_refused(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (7, 9), channels=2)
    ny, nx, _ = partition.local_shape
    for shape in ((ny + 1, nx, 2), (nx, 2), (2, ny, nx + 1, 2)):
        with pytest.raises(ValueError, match="stencil Jacobian: got a state of shape") as caught:
            StencilJacobian(partition, 1, shape)
        assert f"{ny}, {nx}" in str(caught.value)
    jacobian = StencilJacobian(partition, 1)
    with pytest.raises(ValueError, match=r"J v has shape \(1,\)"):
        jacobian.assemble(lambda v: v[:1], 1.0)
    with pytest.raises(ValueError, match=r"mass has shape \(3,\)"):
        jacobian.assemble(lambda v: v, 1.0, mass=torch.ones(3))
    with pytest.raises(ConfigurationError, match=r"width = \(-1, -1\): must be at least 0"):
        StencilJacobian(partition, -1)
