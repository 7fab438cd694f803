"""The sums of a backward pass: the adjoint of the state, and the gradient with respect to the parameters.

Tensors that were given to a sum, or returned by autograd, may be in use elsewhere. They are never written to: the first
addition makes a new tensor, and later ones add to that in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.system.torch_internals import add_in_place

Products = Sequence[torch.Tensor | None]
"""One product for each part of the state or each parameter; None is zero."""


class AdjointSums:
    """Adjoint and gradient of a solve, part by part.

    `adjoint` is replaced, never written to. It has the type of the state.
    The gradient of a parameter has the wider one of that type and its own.
    """

    def __init__(self, layout: StateLayout, parameters: int) -> None:
        self._layout, self._parameters = layout, parameters
        self.adjoint: list[torch.Tensor] = []
        self.gradient: list[torch.Tensor | None] = []
        self._owns_gradient = False

    def start(self) -> None:
        """Begin a backward pass with both sums zero."""
        self.adjoint = []
        self.gradient, self._owns_gradient = [None] * self._parameters, False

    def add_to_adjoint(self, parts: Products) -> None:
        """Add to the adjoint. The first parts become the adjoint without a copy."""
        layout = self._layout
        given = [None if part is None else layout.scalar(part) for part in parts]
        if self.adjoint:
            pairs = zip(self.adjoint, given, strict=True)
            self.adjoint = [old if part is None else old + part for old, part in pairs]
            return
        dtype, device = layout.state_dtype, layout.vec_device
        self.adjoint = [
            torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            for part, shape in zip(given, layout.shapes, strict=True)
        ]

    def replace_gradient(self, gradient: Sequence[torch.Tensor | None]) -> None:
        """Set the gradient to tensors that autograd returned."""
        self.gradient, self._owns_gradient = list(gradient), False

    def add_to_gradient(self, products: Products) -> None:
        """Add one product for each parameter to the gradient."""
        if not products:
            return
        layout, gradient = self._layout, self.gradient
        every = all(product is not None for product in products)
        if every and self._owns_gradient:
            if layout.device != layout.vec_device:
                products = [self._summand(product) for product in products if product is not None]
            add_in_place(gradient, products)  # type: ignore[arg-type]
            return
        self._owns_gradient = every and all(old is not None for old in gradient)
        for number, (old, product) in enumerate(zip(gradient, products, strict=True)):
            if product is not None:
                new = self._summand(product)
                gradient[number] = new if old is None else old + new

    def _summand(self, product: torch.Tensor) -> torch.Tensor:
        """Convert a product with respect to a parameter to the type and device of its sum."""
        layout = self._layout
        return product.to(layout.vec_device, torch.promote_types(product.dtype, layout.state_dtype))

    def take_time_gradients(self) -> tuple[float, float]:
        """Return the last two entries of the gradient, each one number, and reset them to zero."""
        first, second = (0.0 if part is None else part.item() for part in self.gradient[-2:])
        self.gradient[-2:], self._owns_gradient = (None, None), False
        return first, second

    def end(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """End the backward pass: return both sums, and keep no reference to them."""
        dtype, device = self._layout.state_dtype, self._layout.vec_device
        adjoint = tuple(self.adjoint)
        gradient = [
            torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            for part, shape in zip(self.gradient, shapes, strict=False)
        ]
        self.adjoint, self.gradient = [], []
        return adjoint, gradient
