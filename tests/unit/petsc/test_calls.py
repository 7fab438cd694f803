"""PETSc's functions that petsc4py lacks do what its own interface or PETSc's manual says."""

from __future__ import annotations

import numpy as np
import pytest
from petsc4py import PETSc

from pnode_dist.petsc import calls


def runge_kutta(name: str) -> PETSc.TS:
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    ts.setType(PETSc.TS.Type.RK)
    ts.setRKType(name)
    return ts


@pytest.mark.parametrize(
    ("name", "a", "b", "c"),
    [
        ("1fe", ((0.0,),), (1.0,), (0.0,)),
        (
            "4",
            ((0, 0, 0, 0), (0.5, 0, 0, 0), (0, 0.5, 0, 0), (0, 0, 1, 0)),
            (1 / 6, 1 / 3, 1 / 3, 1 / 6),
            (0, 0.5, 0.5, 1),
        ),
    ],
    ids=["euler", "classical"],
)
def test_the_tableau_is_that_of_the_textbook(
    name: str, a: tuple[tuple[float, ...], ...], b: tuple[float, ...], c: tuple[float, ...]
) -> None:
    found = calls.runge_kutta_tableau(runge_kutta(name))
    np.testing.assert_allclose(found[0], a, rtol=1e-15)
    np.testing.assert_allclose(found[1], b, rtol=1e-15)
    np.testing.assert_allclose(found[2], c, rtol=1e-15)


def test_a_registered_method_is_read_back_as_it_was_given() -> None:
    a, b, c = ((0.0, 0.0), (0.75, 0.0)), (1 / 3, 2 / 3), (0.0, 0.75)
    calls.register_runge_kutta("ralston of the tests", 2, a, b, c, (1.0, 0.0))
    assert calls.runge_kutta_tableau(runge_kutta("ralston of the tests")) == (a, b, c, (1.0, 0.0))
    calls.register_runge_kutta("ralston without an estimate", 2, a, b, c, None)
    assert calls.runge_kutta_tableau(runge_kutta("ralston without an estimate")) == (a, b, c, None)


def test_the_tableau_of_a_ts_of_another_type_is_an_error() -> None:
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    ts.setType(PETSc.TS.Type.EULER)
    with pytest.raises(PETSc.Error):
        calls.runge_kutta_tableau(ts)


def test_the_stages_of_the_midpoint_rule_are_its_last_midpoint() -> None:
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    ts.setType(PETSc.TS.Type.THETA)
    ts.setTheta(0.5)
    u = PETSc.Vec().createSeq(1)
    u.set(1.0)
    f = u.duplicate()

    def residual(ts: PETSc.TS, t: float, x: PETSc.Vec, xdot: PETSc.Vec, f: PETSc.Vec) -> None:
        f.setArray(xdot.array_r + x.array_r)

    def jacobian(
        ts: PETSc.TS, t: float, x: PETSc.Vec, xdot: PETSc.Vec, shift: float, j: PETSc.Mat, p: PETSc.Mat
    ) -> None:
        p.setValue(0, 0, shift + 1.0)
        p.assemble()

    matrix = PETSc.Mat().createDense((1, 1), comm=PETSc.COMM_SELF)
    matrix.setUp()
    ts.setIFunction(residual, f)
    ts.setIJacobian(jacobian, matrix, matrix)
    ts.setSolution(u)
    ts.setTimeStep(0.5)
    ts.setMaxSteps(1)
    ts.setMaxTime(1.0)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
    ts.getSNES().setTolerances(rtol=1e-12)
    ts.setUp()
    ts.step()
    handles = calls.stage_handles(ts)
    midpoint = calls.local_array(handles[0], 1)[0]
    assert midpoint == pytest.approx((1.0 + u.array_r[0]) / 2, rel=1e-10)


def test_the_local_array_is_the_memory_of_the_vec() -> None:
    vec = PETSc.Vec().createSeq(3)
    vec.setArray([1.0, 2.0, 3.0])
    found = calls.local_array(vec.handle, 3)
    np.testing.assert_array_equal(found, vec.array_r)
    vec.scale(2.0)
    np.testing.assert_array_equal(found, [2.0, 4.0, 6.0])


def test_the_local_array_of_a_rank_without_entries_is_empty() -> None:
    assert calls.local_array(PETSc.Vec().createSeq(0).handle, 0).shape == (0,)


def test_scalars_at_an_address_are_those_of_the_array_there() -> None:
    values = np.arange(4, dtype=PETSc.ScalarType)
    buffer = calls.scalars_at(values.ctypes.data, 4)
    np.testing.assert_array_equal(np.frombuffer(buffer, dtype=PETSc.ScalarType), values)


def test_all_iterations_of_a_linear_solver_are_counted() -> None:
    n = 20
    matrix = PETSc.Mat().createAIJ((n, n), nnz=3, comm=PETSc.COMM_SELF)
    for row in range(n):
        for column, value in ((row - 1, -1.0), (row, 2.5), (row + 1, -1.2)):
            if 0 <= column < n:
                matrix.setValue(row, column, value)
    matrix.assemble()
    ksp = PETSc.KSP().create(comm=PETSc.COMM_SELF)
    ksp.setOperators(matrix)
    ksp.setType(PETSc.KSP.Type.GMRES)
    ksp.getPC().setType(PETSc.PC.Type.NONE)
    x, b = matrix.createVecs()
    b.set(1.0)
    total = 0
    for solve in (ksp.solve, ksp.solveTranspose, ksp.solve):
        solve(b, x)
        total += ksp.getIterationNumber()
    assert calls.total_linear_iterations(ksp) == total > 3


def test_an_option_counts_as_read_once_petsc_has_looked_it_up() -> None:
    database = PETSc.Options()
    database.setValue("pnode_probe", "3")
    assert not calls.option_was_read("pnode_probe")
    assert database.getInt("pnode_probe") == 3
    assert calls.option_was_read("pnode_probe")
    database.delValue("pnode_probe")
    assert not calls.option_was_read("pnode_probe")


def test_a_matrix_of_coordinates_holds_the_values_at_them() -> None:
    matrix = PETSc.Mat().create(comm=PETSc.COMM_SELF)
    matrix.setSizes((2, 3))
    matrix.setType(PETSc.Mat.Type.AIJ)
    rows, columns = np.array([1, 0, 1, 1]), np.array([2, 0, -1, 0])
    calls.preallocate_coordinates(matrix, rows, columns)
    for factor in (1.0, 2.0):
        calls.set_coordinate_values(matrix, factor * np.array([5.0, 3.0, 9.0, 4.0]))
        np.testing.assert_array_equal(matrix[:, :], factor * np.array([[3.0, 0.0, 0.0], [4.0, 0.0, 5.0]]))
    np.testing.assert_array_equal(rows, [1, 0, 1, 1])
