"""Kernels that move between temperatures."""
