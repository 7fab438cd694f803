"""The memory of tensors as MPI buffers."""

import numpy as np
import pytest
import torch

from pnode_dist.distributed.buffers import bytes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_one_entry_of_any_stride_is_its_bytes(dtype: torch.dtype) -> None:
    entry = torch.arange(6).to(dtype).view(2, 3)[1:, 1:2]
    assert entry.is_contiguous()
    assert entry.stride() == (3, 1)
    # Without the axis of stride 1, as after an indexing of a column.
    entry = entry.squeeze(1)
    assert np.array_equal(bytes_of(entry), np.array([4], dtype=entry.numpy().dtype).view(np.uint8))


def test_contiguous_entries_are_their_bytes_without_a_copy() -> None:
    values = torch.arange(6, dtype=torch.float64)[2:].view(2, 2)
    found = bytes_of(values)
    assert np.array_equal(found.view(np.float64), [2.0, 3.0, 4.0, 5.0])
    found.view(np.float64)[0] = 7.0
    assert values[0, 0] == 7.0
