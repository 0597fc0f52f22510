"""Compiles blocks of sampler steps into single functions, and rewrites their graphs before that."""
