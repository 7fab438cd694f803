"""Two-layer quasi-geostrophic turbulence: learn the effect of scales that the grid does not resolve."""
