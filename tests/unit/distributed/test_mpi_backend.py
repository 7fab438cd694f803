"""Requests of torch to a process group besides collectives, on one rank."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.mpi_backend import MPIProcessGroup
from pnode_dist.distributed.reductions import reduction_of


def test_a_group_has_devices_only_while_torch_has_it(mesh: Mesh) -> None:
    own = MPIProcessGroup(MPI.COMM_SELF.Dup())
    assert own._device_types == []
    own.free()
    group = dist.new_group([0])
    assert torch.device("cpu") in group._device_types
    assert group._get_backend(torch.device("cpu")) is group
    assert not group.supports_tensor_alloc(torch.device("cpu"))
    dist.destroy_process_group(group)
    assert group._device_types == []


def test_a_group_has_the_timeout_that_it_was_made_with_or_given_later(mesh: Mesh) -> None:
    group = dist.new_group([0], timeout=timedelta(seconds=7))
    assert group._agreement.timeout == 7
    group.set_timeout(timedelta(seconds=3))
    assert group._agreement.timeout == 3


def test_groups_of_torch_s_own_making_end_with_the_last_mesh() -> None:
    with Mesh() as first:
        with Mesh():
            group = dist.new_group([0])
        assert group.comm != MPI.COMM_NULL
        assert first.sum(torch.ones(1)).item() == 1
    assert group.comm == MPI.COMM_NULL


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (dist.ReduceOp.AVG, torch.int64),
        (dist.ReduceOp.AVG, torch.bool),
        (dist.ReduceOp.BAND, torch.float32),
        (dist.ReduceOp.MAX, torch.complex64),
        (dist.ReduceOp.SUM, torch.complex32),
    ],
    ids=str,
)
def test_reductions_without_a_meaning_are_refused_by_name(operation: dist.ReduceOp, dtype: torch.dtype) -> None:
    with pytest.raises(NotImplementedError, match=rf"does not reduce {dtype} with [A-Z]+$"):
        reduction_of(operation, dtype)


def test_sparse_tensors_are_refused(mesh: Mesh) -> None:
    with pytest.raises(NotImplementedError, match=r"moves dense tensors, got one on cpu with layout torch.sparse_coo"):
        dist.broadcast(torch.eye(2).to_sparse(), 0, group=mesh.world_group)
