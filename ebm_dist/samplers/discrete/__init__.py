"""Kernels over binary and categorical events."""
