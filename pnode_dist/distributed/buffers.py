"""A tensor's memory as MPI sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a contiguous CPU tensor as bytes, for messages that move data without interpreting it."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()
