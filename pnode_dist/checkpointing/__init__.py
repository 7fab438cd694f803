"""What the adjoint needs of the forward trajectory: how much may be kept, when, where, and how it is run again."""
