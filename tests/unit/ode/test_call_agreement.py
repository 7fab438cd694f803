"""Shapes of a state on several ranks: which belong to one state."""

from __future__ import annotations

import pytest

from pnode_dist.ode.call_agreement import state_shape
from pnode_dist.partition.protocol import Partition

Shape = tuple[int, ...]


class Part:
    """The one thing that `state_shape` asks a partition for."""

    def __init__(self, *local_shape: int) -> None:
        self.local_shape = local_shape


def agree(parts: list[Shape], states: list[list[Shape]]) -> bool:
    """Whether these shapes, rank by rank, are those of one state over a partition with these parts."""
    here: list[Partition] = [Part(*part) for part in parts]  # type: ignore[misc]
    found = [state_shape(shapes, part) for shapes, part in zip(states, here, strict=True)]
    verdicts = {shape.agrees_with(found) for shape in found}
    assert len(verdicts) == 1
    return verdicts.pop()


ALIKE: dict[str, tuple[list[Shape], list[list[Shape]]]] = {
    "the parts": ([(4, 3), (3, 3)], [[(4, 3)], [(3, 3)]]),
    "with axes in front": ([(4,), (3,)], [[(2, 4)], [(2, 3)]]),
    "with axes behind": ([(4,), (3,)], [[(4, 3)], [(3, 3)]]),
    "a rank without a part": ([(1,), (0,)], [[(2, 1)], [(2, 0)]]),
    "beside one of the same size on all": ([(4,), (3,)], [[(4,), (4,)], [(3,), (4,)]]),
    "beside one of another size": ([(4,), (3,)], [[(4,), (4,)], [(3,), (0,)]]),
    "nothing of the partition": ([(4,), (3,)], [[(7,)], [(9,)]]),
}
DIFFERENT: dict[str, tuple[list[Shape], list[list[Shape]]]] = {
    "one that is not the part": ([(4,), (3,)], [[(4,)], [(4 + 1,)]]),
    "other axes in front": ([(4,), (3,)], [[(2, 4)], [(1, 3)]]),
    "other axes in front beside one that fits": ([(4,), (3,)], [[(4,), (2, 4)], [(3,), (1, 3)]]),
    "other axes behind": ([(4,), (3,)], [[(4, 4)], [(3, 2)]]),
    "fewer axes": ([(4,), (3,)], [[(4,)], [(1, 3)]]),
    "fewer parts": ([(4,), (3,)], [[(4,), (4,)], [(3,)]]),
}


@pytest.mark.parametrize("case", ALIKE)
def test_shapes_of_one_state_agree(case: str) -> None:
    assert agree(*ALIKE[case])


@pytest.mark.parametrize("case", DIFFERENT)
def test_shapes_of_different_states_do_not_agree(case: str) -> None:
    assert not agree(*DIFFERENT[case])


def test_equal_shapes_make_equal_facts_and_show_their_sizes() -> None:
    first, second = (state_shape([(2, size), (5,)], Part(size)) for size in (4, 3))  # type: ignore[arg-type]
    assert first == second
    assert repr(first) == repr(second)
    assert str(first) == "[2, 4], [5]"
