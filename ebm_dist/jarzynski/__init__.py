"""Weights of chains whose energy changes beneath them."""
