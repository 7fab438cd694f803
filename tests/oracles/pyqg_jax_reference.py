"""Write `qg_reference.npz`: tendencies, a filtered state and a gradient of pyqg-jax, on a small grid.

Run by hand in an environment with pyqg-jax 0.8.1: `python tests/oracles/pyqg_jax_reference.py`. The package under test
is not imported. `tests/mpi/test_qg_physics.py` reads the file.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pyqg_jax.qg_model import QGModel
from pyqg_jax.state import Precision

jax.config.update("jax_enable_x64", True)

FILE = Path(__file__).with_name("qg_reference.npz")
NY, NX, LENGTH = 18, 20, 5e5
STEP, STEPS = 3600.0, 20
CONFIGURATIONS = {"eddy": {}, "jet": {"rek": 7e-8, "delta": 0.1, "beta": 1e-11}}


def tendency(model: QGModel, q: jax.Array) -> jax.Array:
    """dq/dt `[layer, y, x]` of the real field q."""
    state = model.create_initial_state(jax.random.key(0)).update(q=q)
    return model.get_updates(state).q


def filtered(model: QGModel, q: jax.Array) -> jax.Array:
    """The real field q after the filter of small scales."""
    state = model.create_initial_state(jax.random.key(0)).update(q=q)
    return model.postprocess_state(state).q


def objective(model: QGModel, q: jax.Array, weights: jax.Array) -> jax.Array:
    """A scalar of the state after `STEPS` classical Runge-Kutta steps, each with the filter."""

    def step(state: jax.Array, _: None) -> tuple[jax.Array, None]:
        first = tendency(model, state)
        second = tendency(model, state + STEP / 2 * first)
        third = tendency(model, state + STEP / 2 * second)
        fourth = tendency(model, state + STEP * third)
        after = state + STEP / 6 * (first + 2 * second + 2 * third + fourth)
        return filtered(model, after), None

    last, _ = jax.lax.scan(step, q, None, length=STEPS)
    return jnp.sum(weights * (last * 1e5) ** 2)


def last(array: jax.Array) -> np.ndarray:
    """`[layer, y, x]` as `[y, x, layer]`."""
    return np.moveaxis(np.asarray(array), 0, -1)


def main() -> None:
    """Write the file."""
    random = np.random.default_rng(0)
    q = jnp.asarray(1e-5 * random.standard_normal((2, NY, NX)))
    weights = jnp.asarray(random.uniform(0.5, 1.5, (2, NY, NX)))
    found = {"q": last(q), "weights": last(weights)}
    for name, changed in CONFIGURATIONS.items():
        model = QGModel(nx=NX, ny=NY, L=LENGTH, W=LENGTH * NY / NX, precision=Precision.DOUBLE, **changed)
        full = model.get_full_state(model.create_initial_state(jax.random.key(0)).update(q=q))
        value, gradient = jax.value_and_grad(lambda state, model=model: objective(model, state, weights))(q)
        found |= {
            f"{name}_u": last(full.u),
            f"{name}_v": last(full.v),
            f"{name}_tendency": last(tendency(model, q)),
            f"{name}_filtered": last(filtered(model, q)),
            f"{name}_objective": np.asarray(value),
            f"{name}_gradient": last(gradient),
        }
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
