"""The files of an export, by name, and how large they may be."""

from __future__ import annotations

WEIGHTS, CONFIG, CARD, GRID, CHAINS = (
    "model.safetensors",
    "config.json",
    "README.md",
    "samples.png",
    "chains.safetensors",
)
MAX_CONFIG_BYTES = 64 * 2**20
"""Largest config.json; the constants of some energies are in it, such as stored patterns."""

MAX_DOWNLOADED = {WEIGHTS: 16 * 2**30, CHAINS: 2 * 2**30, CONFIG: MAX_CONFIG_BYTES}
"""Files that loading reads, and the largest size in bytes of each that is downloaded."""
