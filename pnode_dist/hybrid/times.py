"""Times of a caller as tensors: numbers, tensors, NumPy arrays and xarray's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pnode_dist.errors import ConfigurationError


def times_of(name: str, given: Any) -> torch.Tensor:
    """Return times as a tensor in double precision on the host, differentiable if `given` is.

    Raises `ConfigurationError` for anything but finite numbers; `name` is that of the argument.
    """
    if isinstance(given, torch.Tensor):
        if given.is_complex() or given.dtype is torch.bool:
            raise ConfigurationError(f"{name}: {given.dtype}: must be real numbers")
        times = given.to("cpu", torch.float64)
    else:
        values = np.asarray(given)
        if values.dtype.kind not in "iuf":
            raise ConfigurationError(
                f"{name}: {values.dtype}: must be numbers (dates: subtract the first one and divide by a "
                "numpy.timedelta64 of one unit)"
            )
        times = torch.as_tensor(values.astype(np.float64))
    if not bool(torch.isfinite(times.detach()).all()):
        raise ConfigurationError(f"{name}: must be finite")
    return times
