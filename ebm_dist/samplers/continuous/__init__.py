"""Kernels over real events."""
