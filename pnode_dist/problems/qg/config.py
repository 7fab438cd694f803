"""Configuration of the quasi-geostrophic problem: the equations, the computed trajectories, the closure.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QGParameters:
    """Two layers of fluid on a beta plane with a sheared mean flow, in SI units, with the names of pyqg.

    For the layers i = 1 (upper) and 2, with J the Jacobian, psi the streamfunction and Q_y the mean gradient of q:

        dq_i/dt = -J(psi_i, q_i) - U_i dq_i/dx - Q_y,i dpsi_i/dx - [i = 2] rek lap(psi_2)
        q_1 = lap(psi_1) + F_1 (psi_2 - psi_1)        F_1 = 1 / (rd^2 (1 + delta))
        q_2 = lap(psi_2) + F_2 (psi_1 - psi_2)        F_2 = delta F_1

    `L` is the length of the domain along x, `rd` the deformation radius, `delta` the ratio H1 / H2 of the thicknesses,
    `H1` that of the upper layer (used by averages over the layers alone), `beta` the gradient of the Coriolis
    parameter, `U1` and `U2` the mean flow, `rek` the drag at the bottom, and `filterfac` the strength of the filter of
    small scales. The defaults are the eddy configuration of A. Ross, Z. Li, P. Perezhogin, C. Fernandez-Granda,
    L. Zanna: Benchmarking of machine learning ocean subgrid parameterizations in an idealized model, J. Adv. Model.
    Earth Syst. 15 (2023).
    """

    L: float = 1e6
    rd: float = 15_000.0
    delta: float = 0.25
    H1: float = 500.0
    beta: float = 1.5e-11
    U1: float = 0.025
    U2: float = 0.0
    rek: float = 5.787e-7
    filterfac: float = 23.6

    @property
    def coupling(self) -> tuple[float, float]:
        """F_1 and F_2 in 1/m^2."""
        upper = 1 / (self.rd**2 * (1 + self.delta))
        return upper, self.delta * upper

    @property
    def gradient(self) -> tuple[float, float]:
        """Q_y of both layers in 1/(m s)."""
        upper, lower = self.coupling
        shear = self.U1 - self.U2
        return self.beta + upper * shear, self.beta - lower * shear


EDDY = QGParameters()
"""The published configuration of isotropic eddies."""
JET = QGParameters(rek=7e-8, delta=0.1, beta=1e-11)
"""The published configuration of jets: less drag and beta, and a deeper lower layer."""
