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
    """Adjoint and gradient of an explicit solve, part by part.

    The adjoint has the type of the state. The gradient of a parameter has the wider one of that type and its own.
    """

    def __init__(self, layout: StateLayout, parameters: int) -> None:
        self._layout, self._parameters = layout, parameters
        self.adjoint: list[torch.Tensor] = []
        self.gradient: list[torch.Tensor | None] = []
        self._owns_adjoint: list[bool] = []
        self._owns_gradient = False

    def start(self) -> None:
        """Begin a backward pass with both sums zero."""
        self.adjoint, self._owns_adjoint = [], []
        self.gradient, self._owns_gradient = [None] * self._parameters, False

    def replace(self, adjoint: list[torch.Tensor]) -> None:
        """Set the adjoint to tensors that autograd returned."""
        self.adjoint, self._owns_adjoint = adjoint, [False] * len(adjoint)

    def add_to_adjoint(self, parts: Products) -> None:
        """Add to the adjoint. The first parts become the adjoint without a copy."""
        layout = self._layout
        given = [None if part is None else layout.scalar(part) for part in parts]
        if self.adjoint:
            for number, part in enumerate(given):
                if part is not None:
                    self._add_part(number, part)
            return
        dtype, device = layout.state_dtype, layout.vec_device
        self.adjoint = [
            torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            for part, shape in zip(given, layout.shapes, strict=True)
        ]
        self._owns_adjoint = [part is None for part in given]

    def add_stages(self, products: dict[int, Products], first_weighted: int) -> None:
        """Add the products of a step's stages to the adjoint, in the order of a backward pass through its graph.

        In such a pass the adjoint of the result is added after the stages behind `first_weighted`, the first stage that
        has a weight in the result.
        """
        for number in range(len(self.adjoint)):
            found = [(stage, product) for stage, parts in products.items() if (product := parts[number]) is not None]
            later = [product for stage, product in found if stage > first_weighted]
            if later:
                total = later[0] if len(later) == 1 else later[0] + later[1]
                for product in later[2:]:
                    total.add_(product)
                self._add_part(number, total)
            for stage, product in found:
                if stage <= first_weighted:
                    self._add_part(number, product)

    def _add_part(self, number: int, product: torch.Tensor) -> None:
        if self._owns_adjoint[number]:
            self.adjoint[number].add_(product)
        else:
            self.adjoint[number] = self.adjoint[number] + product
            self._owns_adjoint[number] = True

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
