"""Parts that several problems share."""
