"""The memory of a tensor as an MPI buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the memory of a contiguous CPU tensor as bytes, for messages that copy data unchanged."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()
