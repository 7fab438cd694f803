"""Second derivatives and tangents of a state spread over the ranks: the same numbers on any number of them."""
