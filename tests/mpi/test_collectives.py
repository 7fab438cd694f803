"""Each collective of torch.distributed on the mpi backend gives numpy's result, for every type and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist import DisagreementError, Mesh

pytestmark = pytest.mark.mpi

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
COMPLEX = [torch.complex64, torch.complex128]
TYPES = [*FLOATS, *INTEGERS, *COMPLEX, torch.bool]
# Their names in older releases of torch.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
SHAPES = [(3, 2), (), (0, 2)]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    with Mesh(timeout=30) as mesh:
        yield mesh.world_group


def values(dtype: torch.dtype, *shape: int, rank: int = RANK, among: int = 3) -> torch.Tensor:
    """Small whole numbers, other ones on each rank, whose sums and products are exact in every type."""
    drawn = np.random.default_rng(rank).integers(0, among, shape)
    return torch.from_numpy(np.asarray(drawn)).to(dtype)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory that is not contiguous."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def array(tensor: torch.Tensor) -> Array:
    if tensor.dtype == torch.bool:
        # A boolean must be stored as 0 or 1.
        assert tensor.contiguous().view(torch.uint8).le(1).all()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def everywhere(dtype: torch.dtype, *shape: int, among: int = 3) -> Array:
    """The values of all ranks, by rank."""
    return np.stack([array(values(dtype, *shape, rank=rank, among=among)) for rank in range(SIZE)])


def check(found: torch.Tensor, wanted: Array, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    # Exact, but for the rounding of a mean.
    assert np.allclose(array(found), wanted, rtol=4e-16, atol=0)


def of_ranks(reduce: Callable[..., Any], terms: Array) -> Array:
    kind = terms.dtype.type if terms.dtype.kind in "iufcb" else None
    return np.asarray(reduce(terms, axis=0)).astype(kind)


REDUCTIONS: dict[str, tuple[Any, Callable[..., Any], list[torch.dtype]]] = {
    "sum": (dist.ReduceOp.SUM, np.sum, TYPES),
    "mean": (dist.ReduceOp.AVG, np.mean, [torch.float64, torch.complex128]),
    "scaled sum": (dist.ReduceOp.PREMUL_SUM, lambda terms, axis: (terms * 0.5).sum(axis), FLOATS),
    "product": (dist.ReduceOp.PRODUCT, np.prod, [*FLOATS, *INTEGERS, torch.bool]),
    "minimum": (dist.ReduceOp.MIN, np.min, [*FLOATS, *INTEGERS, torch.bool]),
    "maximum": (dist.ReduceOp.MAX, np.max, [*FLOATS, *INTEGERS, torch.bool]),
    "and": (dist.ReduceOp.BAND, np.bitwise_and.reduce, [*INTEGERS, torch.bool]),
    "or": (dist.ReduceOp.BOR, np.bitwise_or.reduce, [*INTEGERS, torch.bool]),
    "exclusive or": (dist.ReduceOp.BXOR, np.bitwise_xor.reduce, [*INTEGERS, torch.bool]),
}


def cases(every: Iterable[Any], by_day: Sequence[Any]) -> list[Any]:
    """All cases, of which those that others stand for run at night."""
    return [case if case in by_day else pytest.param(case, marks=pytest.mark.nightly) for case in every]


def operation_of(name: str) -> Any:
    given = REDUCTIONS[name][0]
    if name != "scaled sum":
        return given
    return given(0.5) if callable(given) else dist._make_nccl_premul_sum(0.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", cases(REDUCTIONS, ["sum", "scaled sum", "and"]))
def test_reductions_are_numpy_s_for_every_type_and_layout(name: str, group: dist.ProcessGroup) -> None:
    _, reduce, types = REDUCTIONS[name]
    for dtype in types:
        for shape in SHAPES:
            for layout in (torch.clone, strided):
                wanted = of_ranks(reduce, everywhere(dtype, *shape))
                found = layout(values(dtype, *shape))
                dist.all_reduce(found, operation_of(name), group=group)
                check(found, wanted, dtype)
                at_last = layout(values(dtype, *shape))
                dist.reduce(at_last, SIZE - 1, operation_of(name), group=group)
                check(at_last, wanted if RANK == SIZE - 1 else array(values(dtype, *shape)), dtype)


@pytest.mark.parametrize("name", cases(["sum", "mean", "scaled sum", "maximum"], ["mean"]))
def test_each_rank_gets_its_part_of_a_scattered_reduction(name: str, group: dist.ProcessGroup) -> None:
    _, reduce, types = REDUCTIONS[name]
    for dtype in types:
        for rows in (2, 0):
            for layout in (torch.clone, strided):
                given, terms = layout(values(dtype, SIZE * rows, 3)), everywhere(dtype, SIZE * rows, 3)
                wanted = of_ranks(reduce, terms)[RANK * rows : (RANK + 1) * rows]
                single = layout(torch.zeros(rows, 3, dtype=dtype))
                reduce_scatter_single(single, given, operation_of(name), group=group)
                check(single, wanted, dtype)
                part = layout(torch.zeros(rows, 3, dtype=dtype))
                dist.reduce_scatter(
                    part, list(given.chunk(SIZE) if rows else [given] * SIZE), operation_of(name), group
                )
                check(part, wanted, dtype)
                check(given, terms[RANK], dtype)


def test_uneven_parts_of_a_reduction_and_of_a_gathering_go_to_their_ranks(group: dist.ProcessGroup) -> None:
    sizes = [rank % 3 for rank in range(SIZE)]
    first = np.cumsum([0, *sizes])
    part = torch.zeros(sizes[RANK], dtype=torch.float64)
    dist.reduce_scatter(part, list(values(part.dtype, sum(sizes)).split(sizes)), group=group)
    check(part, everywhere(part.dtype, sum(sizes)).sum(0)[first[RANK] : first[RANK + 1]], part.dtype)
    gathered = [torch.zeros(size) for size in sizes]
    dist.all_gather(gathered, values(torch.float32, sizes[RANK]), group=group)
    for rank, found in enumerate(gathered):
        check(found, array(values(torch.float32, sizes[rank], rank=rank)), torch.float32)


@pytest.mark.parametrize(
    "dtype", cases([*TYPES, torch.complex32, torch.float8_e4m3fn], [torch.float64, torch.bfloat16, torch.bool]), ids=str
)
def test_values_travel_unchanged_in_every_type_and_layout(dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    root = SIZE - 1
    for shape in SHAPES:
        own = [values(torch.float32, *shape, rank=rank).to(dtype) for rank in range(SIZE)]
        for layout in (torch.clone, strided):
            given, empty = layout(own[RANK]), torch.zeros(shape, dtype=dtype)
            sent = given.clone()
            dist.broadcast(sent, root, group=group)
            gathered = [layout(empty) for _ in own]
            dist.all_gather(gathered, given, group=group)
            whole = torch.zeros(SIZE, *shape, dtype=dtype)
            all_gather_single(whole, given, group=group)
            at_root = [layout(empty) for _ in own] if root == RANK else None
            dist.gather(given, at_root, root, group=group)
            scattered = layout(empty)
            dist.scatter(scattered, [layout(part) for part in own] if root == RANK else None, root, group=group)
            swapped = [layout(empty) for _ in own]
            dist.all_to_all(swapped, [given] * SIZE, group=group)
            for found, wanted in [
                (sent, own[root]),
                (whole, torch.stack(own)),
                (scattered, own[RANK]),
                *zip(gathered, own, strict=True),
                *zip(at_root or own, own, strict=True),
                *zip(swapped, own, strict=True),
            ]:
                assert found.dtype == dtype
                assert torch.equal(found.to(torch.complex64), wanted.to(torch.complex64))


def test_a_gathering_into_memory_that_holds_the_own_part_is_right(group: dist.ProcessGroup) -> None:
    wanted = everywhere(torch.float64, 3)
    in_place = torch.zeros(SIZE, 3, dtype=torch.float64)
    in_place[RANK] = values(torch.float64, 3)
    all_gather_single(in_place, in_place[RANK], group=group)
    check(in_place, wanted, torch.float64)
    shifted = torch.zeros(SIZE, 3, dtype=torch.float64)
    own = shifted[(RANK + 1) % SIZE]
    own.copy_(values(torch.float64, 3))
    all_gather_single(shifted, own, group=group)
    check(shifted, wanted, torch.float64)
    whole = values(torch.float64, SIZE, 2)
    reduce_scatter_single(whole[RANK], whole, group=group)
    check(whole[RANK], everywhere(torch.float64, SIZE, 2).sum(0)[RANK], torch.float64)
    swapped = values(torch.float64, SIZE, 2)
    dist.all_to_all_single(swapped, swapped, group=group)
    check(swapped, everywhere(torch.float64, SIZE, 2)[:, RANK], torch.float64)


def test_an_exchange_of_uneven_rows_is_the_transpose_of_its_splits(group: dist.ProcessGroup) -> None:
    rows = [[(sender + 2 * receiver) % 3 for receiver in range(SIZE)] for sender in range(SIZE)]
    sent = [values(torch.int64, sum(rows[rank]), 2, rank=rank, among=100) for rank in range(SIZE)]
    wanted = torch.cat([sent[rank].split(rows[rank])[RANK] for rank in range(SIZE)])
    received = [rows[rank][RANK] for rank in range(SIZE)]
    for layout in (torch.clone, strided):
        found = layout(torch.zeros(sum(received), 2, dtype=torch.int64))
        dist.all_to_all_single(found, layout(sent[RANK]), received, rows[RANK], group=group)
        assert torch.equal(found, wanted)


def test_functional_collectives_wait_for_their_results(group: dist.ProcessGroup) -> None:
    from torch.distributed import _functional_collectives as functional

    def done(found: Any) -> Any:
        waited = [functional.wait_tensor(each) for each in (found if isinstance(found, list) else [found])]
        return waited if isinstance(found, list) else waited[0]

    gather = getattr(functional, "all_gather_single", functional.all_gather_tensor)
    scatter = getattr(functional, "reduce_scatter_single", functional.reduce_scatter_tensor)
    gathers = getattr(functional, "all_gather_single_coalesced", functional.all_gather_into_tensor_coalesced)
    scatters = getattr(functional, "reduce_scatter_single_coalesced", functional.reduce_scatter_tensor_coalesced)
    terms, own = everywhere(torch.float64, SIZE, 2), values(torch.float64, SIZE, 2)
    total, part = terms.sum(0), slice(RANK, RANK + 1)
    check(done(functional.all_reduce(own, "sum", group)), total, own.dtype)
    check(done(functional.all_reduce(own, "avg", group)), terms.mean(0), own.dtype)
    check(done(gather(own, 0, group)), terms.reshape(-1, 2), own.dtype)
    check(done(scatter(own, "sum", 0, group)), total[part], own.dtype)
    check(done(functional.broadcast(own, SIZE - 1, group)), terms[-1], own.dtype)
    check(done(functional.all_to_all_single(own, None, None, group)), terms[:, RANK], own.dtype)
    check(done(functional.all_reduce_coalesced([own, 2 * own], "sum", group))[1], 2 * total, own.dtype)
    check(done(gathers([own, 2 * own], group))[1], 2 * terms.reshape(-1, 2), own.dtype)
    check(done(scatters([own, 2 * own], "sum", [0, 0], group))[1], 2 * total[part], own.dtype)


def test_large_messages_around_a_ring_need_no_order_of_sends_and_receives(group: dist.ProcessGroup) -> None:
    if SIZE == 1:
        return
    sent = torch.full((300_000,), float(RANK))
    found = [strided(torch.zeros(300_000)), torch.zeros(300_000)]
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, after, group),
            dist.P2POp(dist.isend, 2 * sent, after, group),
            dist.P2POp(dist.irecv, found[0], before, group),
            dist.P2POp(dist.irecv, found[1], before, group),
        ]
    )
    for work in reversed(works):
        assert work.wait()
        assert work.is_completed()
    assert torch.equal(found[0], torch.full_like(sent, before))
    assert torch.equal(found[1], torch.full_like(sent, 2 * before))
    dist.isend(torch.full((1,), float(RANK)), after, group)
    message = torch.zeros(1)
    assert dist.recv(message, group=group) == before
    assert message.item() == before


def test_a_message_that_does_not_come_in_its_time_raises(group: dist.ProcessGroup) -> None:
    if SIZE == 1:
        return
    work = dist.irecv(torch.zeros(2), (RANK - 1) % SIZE, group, tag=7)
    assert not work.is_completed()
    with pytest.raises(TimeoutError, match=r"not complete after 0.02 s"):
        work.wait(timedelta(seconds=0.02))
    dist.barrier(group)
    dist.send(torch.ones(2), (RANK + 1) % SIZE, group, tag=7)
    assert work.wait()


def test_objects_go_through_every_object_collective(group: dist.ProcessGroup) -> None:
    own = {"rank": RANK, "text": "x" * RANK}
    gathered: list[Any] = [None] * SIZE
    dist.all_gather_object(gathered, own, group=group)
    assert [each["text"] for each in gathered] == ["x" * rank for rank in range(SIZE)]
    box: list[Any] = [None]
    dist.scatter_object_list(box, gathered if RANK == 0 else None, 0, group=group)
    assert box == [own]


def test_groups_of_some_ranks_work_by_themselves() -> None:
    odd = dist.new_group([rank for rank in range(SIZE) if rank % 2]) if SIZE > 1 else None
    even = dist.new_group([rank for rank in range(SIZE) if rank % 2 == 0], timeout=timedelta(seconds=20))
    total = torch.ones(1)
    dist.all_reduce(total, group=odd if RANK % 2 else even)
    assert total.item() == (SIZE // 2 if RANK % 2 else (SIZE + 1) // 2)


def raised_alike(kind: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=match):
        call()
    # The ranks are still in step.
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == SIZE


def test_wrong_arguments_raise_the_same_error_on_all_ranks(group: dist.ProcessGroup) -> None:
    one = torch.ones(1)
    wrong = RANK == 0
    raised_alike(
        ValueError, "output has 7 entries", lambda: all_gather_single(torch.ones(7 if wrong else SIZE), one, group)
    )
    raised_alike(
        ValueError,
        "inputs have",
        lambda: reduce_scatter_single(torch.ones(9 if wrong else 1), torch.ones(SIZE), group=group),
    )
    raised_alike(
        NotImplementedError,
        "does not reduce torch.int64 with AVG",
        lambda: dist.all_reduce(one.long(), dist.ReduceOp.AVG),
    )
    raised_alike(
        NotImplementedError,
        "moves dense tensors, got one on meta",
        lambda: dist.all_reduce(one.to("meta" if wrong else "cpu"), group=group),
    )
    raised_alike(
        ValueError,
        "has 5 rows",
        lambda: dist.all_to_all_single(torch.ones(SIZE), torch.ones(5 if wrong else SIZE), None, [1] * SIZE, group),
    )


def test_exchanges_and_reductions_that_do_not_match_are_refused(group: dist.ProcessGroup) -> None:
    if SIZE == 1:
        return
    first = RANK == 0
    operation = dist.ReduceOp.MAX if first else dist.ReduceOp.SUM
    raised_alike(DisagreementError, "reduction: rank 0: MAX", lambda: dist.all_reduce(torch.ones(2), operation, group))
    sent = [2 if first else 1, *[1] * (SIZE - 1)]
    raised_alike(
        ValueError,
        "the ranks send",
        lambda: dist.all_to_all_single(
            torch.ones(SIZE + 1), torch.ones(sum(sent)), [1] * (SIZE - 1) + [2], sent, group
        ),
    )
