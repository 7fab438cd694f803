"""A calibration of a served decay rate by samplers of others, each through UM-Bridge's own client.

    python clients.py URL SAMPLER

Prints, as JSON, the posterior mean, its standard error, and the number of evaluations. Run by an interpreter that has
umbridge, emcee and tinyDA, and knows nothing of this project.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

MODEL = "forecast_of_parameters"
# Synthetic observations of the mean state at two leads, with their noise, and the prior of the rate.
OBSERVED, NOISE = np.array([1.70, 1.44]), 0.03
PRIOR_MEAN, PRIOR_DEVIATION = 0.3, 0.2


def of_emcee(model: Any) -> tuple[float, float, int]:
    """Draw from the posterior density, with an ensemble of walkers."""
    import emcee

    def log_posterior(rate: Any) -> float:
        (output,) = model([rate.tolist()])
        misfit = (np.array(output) - OBSERVED) / NOISE
        prior = (rate[0] - PRIOR_MEAN) / PRIOR_DEVIATION
        return float(-0.5 * (misfit @ misfit + prior**2))

    walkers, steps, discarded = 8, 260, 60
    np.random.seed(0)
    sampler = emcee.EnsembleSampler(walkers, 1, log_posterior)
    sampler.run_mcmc(PRIOR_MEAN + 0.05 * np.random.randn(walkers, 1), steps)
    chains = sampler.get_chain(discard=discarded)[:, :, 0]
    length = float(emcee.autocorr.integrated_time(chains, quiet=True)[0])
    return float(chains.mean()), float(chains.std() * np.sqrt(length / chains.size)), walkers * steps


def of_tinyda(model: Any) -> tuple[float, float, int]:
    """Draw by Langevin proposals, which need the gradient."""
    import emcee
    import scipy.stats as stats
    import tinyDA

    prior = stats.multivariate_normal([PRIOR_MEAN], [[PRIOR_DEVIATION**2]])
    likelihood = tinyDA.GaussianLogLike(OBSERVED, NOISE**2 * np.eye(2))
    posterior = tinyDA.Posterior(prior, likelihood, tinyDA.UmBridgeModel(model))
    np.random.seed(0)
    steps, discarded = 2000, 200
    chain = tinyDA.sample(
        posterior, tinyDA.MALA(scaling=0.05), iterations=steps, n_chains=1, initial_parameters=[np.array([0.3])]
    )
    found = np.array([link.parameters[0] for link in chain["chain_0"][discarded:]])
    length = float(emcee.autocorr.integrated_time(found, quiet=True)[0])
    return float(found.mean()), float(found.std() * np.sqrt(length / found.size)), steps


if __name__ == "__main__":
    import umbridge

    url, sampler = sys.argv[1:]
    mean, error, evaluations = {"emcee": of_emcee, "tinyDA": of_tinyda}[sampler](umbridge.HTTPModel(url, MODEL))
    print(json.dumps({"mean": mean, "error": error, "evaluations": evaluations}))
