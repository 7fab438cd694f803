"""Options are given to torch's functions where they take them."""

from __future__ import annotations

from pnode_dist.system.torch_releases import known_options


def test_an_option_is_left_out_only_where_the_function_does_not_take_it() -> None:
    def newer(module: object, *, reason: str) -> None: ...
    def older(module: object) -> None: ...

    assert known_options(newer, reason="why") == {"reason": "why"}
    assert known_options(older, reason="why") == {}


def test_options_of_a_constructor_are_those_of_its_init() -> None:
    class Wrapper:
        def __init__(self, module: object, init_sync: bool = True) -> None: ...

    assert known_options(Wrapper.__init__, init_sync=False, absent=1) == {"init_sync": False}
