"""Inverse problems and data assimilation: controls, observations, and their minimisation by PETSc's TAO."""

from pnode_dist.inverse.control import Control as Control
from pnode_dist.inverse.control import Gaussian as Gaussian
from pnode_dist.inverse.control_space import BlockCovariance as BlockCovariance
from pnode_dist.inverse.control_space import ControlSpace as ControlSpace
from pnode_dist.inverse.covariance import Covariance as Covariance
from pnode_dist.inverse.covariance import Dense as Dense
from pnode_dist.inverse.covariance import Diagonal as Diagonal
from pnode_dist.inverse.forward_model import ModelError as ModelError
from pnode_dist.inverse.grid_covariance import GridCovariance as GridCovariance
from pnode_dist.inverse.inverse import Inverse as Inverse
from pnode_dist.inverse.laplace import Laplace as Laplace
from pnode_dist.inverse.laplace import laplace as laplace
from pnode_dist.inverse.log_posterior import NegativeLogPosterior as NegativeLogPosterior
from pnode_dist.inverse.minimise import Minimum as Minimum
from pnode_dist.inverse.minimise import Progress as Progress
from pnode_dist.inverse.minimise import minimise as minimise
from pnode_dist.inverse.observation import Observation as Observation
from pnode_dist.inverse.operators import GlobalMean as GlobalMean
from pnode_dist.inverse.operators import Points as Points
from pnode_dist.inverse.operators import Subsample as Subsample
from pnode_dist.inverse.spread import Spread as Spread
from pnode_dist.inverse.spread import forecast_spread as forecast_spread
from pnode_dist.inverse.tao_methods import METHODS as METHODS
from pnode_dist.inverse.taylor import TaylorTest as TaylorTest
from pnode_dist.inverse.taylor import taylor_test as taylor_test

__all__ = [
    "METHODS",
    "BlockCovariance",
    "Control",
    "ControlSpace",
    "Covariance",
    "Dense",
    "Diagonal",
    "Gaussian",
    "GlobalMean",
    "GridCovariance",
    "Inverse",
    "Laplace",
    "Minimum",
    "ModelError",
    "NegativeLogPosterior",
    "Observation",
    "Points",
    "Progress",
    "Spread",
    "Subsample",
    "TaylorTest",
    "forecast_spread",
    "laplace",
    "minimise",
    "taylor_test",
]
