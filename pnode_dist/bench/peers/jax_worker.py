"""diffrax's side of the comparison: `python jax_worker.py CASE SOLVER CORE`. Runs in an environment without pnode_dist.

Solvers are `diffrax` with its default adjoint, `diffrax backsolve`, the continuous adjoint, and `pyqg-jax`.
"""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

# Found beside this file: pnode_dist itself cannot be imported here.
from cases import LENGTH, PYQG, VORTICITY, Arrays, PeerCase, arrays_of, case_of
from diffrax._local_interpolation import ThirdOrderHermitePolynomialInterpolation
from diffrax._solver.runge_kutta import AbstractERK, ButcherTableau
from serving import Solved, serve


class Classical(AbstractERK):  # type: ignore[misc]
    """The classical method of order 4, which diffrax does not include."""

    tableau = ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.array([0.0, 0.0, 0.0, 0.0]),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls = ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        """Order of convergence."""
        return 4


def perceptron(t: Any, u: Any, p: Any) -> Any:
    """W2 tanh(W1 u + b1) + b2."""
    return jnp.tanh(u @ p["w1"].T + p["b1"]) @ p["w2"].T + p["b2"]


def convolution(t: Any, u: Any, p: Any) -> Any:
    """Three convolutions with tanh between them, zero padding."""
    for number in (1, 2, 3):
        u = jax.lax.conv_general_dilated(u, p[f"w{number}"], (1, 1), "SAME") + p[f"b{number}"][:, None, None]
        if number < 3:
            u = jnp.tanh(u)
    return u


def flow(t: Any, u: Any, p: Any) -> Any:
    """A velocity, and minus the trace of its Jacobian."""

    def of_sample(x: Any) -> Any:
        velocity = perceptron(t, x, p)
        return jnp.append(velocity, -jnp.trace(jax.jacfwd(lambda x: perceptron(t, x, p))(x)))

    return jax.vmap(of_sample)(u[:, :-1])


def slow(t: Any, u: Any, p: Any) -> Any:
    """The first reaction, A -> B."""
    rate = jnp.exp(p["log_rates"][0]) * u[0]
    return jnp.stack([-rate, rate, jnp.zeros_like(rate)])


def fast(t: Any, u: Any, p: Any) -> Any:
    """The other two, B + C -> A + C and 2 B -> B + C."""
    back, on = jnp.exp(p["log_rates"][1]) * u[1] * u[2], jnp.exp(p["log_rates"][2]) * u[1] * u[1]
    return jnp.stack([back, -back - on, on])


def kinetics(t: Any, u: Any, p: Any) -> Any:
    """All three reactions."""
    return slow(t, u, p) + fast(t, u, p)


FUNCTIONS = {"perceptron": perceptron, "convolution": convolution, "flow": flow, "kinetics": kinetics}


def solver_of(case: PeerCase) -> Any:
    """Return diffrax's solver of the method."""
    if case.is_implicit:
        kinds = {"beuler": diffrax.ImplicitEuler, "dirk_es324sal": diffrax.Kvaerno3, "arkimex_3": diffrax.KenCarp3}
        # The chord methods that are diffrax's defaults do not converge here.
        newton = optimistix.Newton(rtol=case.tolerance, atol=case.tolerance)
        return kinds[case.method](root_finder=newton)
    return {"rk4": Classical, "dopri5": diffrax.Dopri5}[case.method]()


def turbulent_end(case: PeerCase) -> Any:
    """Return the solve of turbulence with pyqg-jax's tendency and filter, from a dictionary of the initial state.

    pyqg-jax has no classical Runge-Kutta method, so the steps are written out.
    """
    from pyqg_jax.qg_model import QGModel
    from pyqg_jax.state import Precision

    ny, nx, _ = case.shape
    model = QGModel(nx=nx, ny=ny, L=LENGTH, W=LENGTH * ny / nx, precision=Precision.DOUBLE)
    blank, size = model.create_initial_state(jax.random.key(0)), 3600 * case.size

    def rate(q: Any) -> Any:
        return model.get_updates(blank.update(q=q)).q

    def step(q: Any, _: None) -> Any:
        first = rate(q)
        second = rate(q + size / 2 * first)
        third = rate(q + size / 2 * second)
        fourth = rate(q + size * third)
        after = q + size / 6 * (first + 2 * second + 2 * third + fourth)
        return model.postprocess_state(blank.update(q=after)).q, None

    def end_of(arrays: Any) -> Any:
        q, _ = jax.lax.scan(step, jnp.moveaxis(arrays["u0"], -1, 0) * VORTICITY, None, length=case.steps)
        return jnp.moveaxis(q, 0, -1) / VORTICITY

    return end_of


def prepare(case: PeerCase, solver: str) -> Solved:
    """Return the compiled solve, and the compiled solve with its gradient."""
    if case.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    arrays = {name: jnp.asarray(value) for name, value in arrays_of(case).items()}
    end_of = turbulent_end(case) if solver == PYQG else diffrax_end(case, solver)

    def loss(arrays: Any) -> Any:
        end = end_of(arrays)
        return jnp.mean(jnp.square(end)), end

    forward, gradient = jax.jit(end_of), jax.jit(jax.value_and_grad(loss, has_aux=True))

    def solved() -> Arrays:
        (_, end), found = jax.block_until_ready(gradient(arrays))
        return {"end": np.asarray(end), **{name: np.asarray(value) for name, value in found.items()}}

    return lambda: jax.block_until_ready(forward(arrays)), solved


def diffrax_end(case: PeerCase, solver: str) -> Any:
    """Return diffrax's solve, a function of a dictionary of the initial state and the parameters."""
    function = FUNCTIONS[case.kind]
    term: Any = diffrax.ODETerm(function)
    if case.method == "arkimex_3":
        term = diffrax.MultiTerm(diffrax.ODETerm(slow), diffrax.ODETerm(fast))
    controller: Any = diffrax.ConstantStepSize()
    if not case.steps:
        controller = diffrax.PIDController(rtol=case.tolerance, atol=case.tolerance)
    adjoint: Any = diffrax.RecursiveCheckpointAdjoint(checkpoints=case.checkpoints or None)
    if solver == "diffrax backsolve":
        adjoint = diffrax.BacksolveAdjoint()

    def end_of(arrays: Any) -> Any:
        parameters = {name: value for name, value in arrays.items() if name != "u0"}

        def of(u0: Any) -> Any:
            found = diffrax.diffeqsolve(
                term,
                solver_of(case),
                t0=0.0,
                t1=case.end,
                dt0=case.size if case.steps else None,
                y0=u0,
                args=parameters,
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=case.steps or 4096,
            )
            assert found.ys is not None
            return found.ys[0]

        # Each of the small systems is solved by itself.
        return jax.vmap(of)(arrays["u0"]) if case.is_implicit else of(arrays["u0"])

    return end_of


if __name__ == "__main__":
    serve(lambda case, solver: prepare(case_of(case), solver))
