"""One evaluation of the right-hand side and its products with vectors."""
