"""File formats of data: tar shards and their manifest, images, npy, npz and IDX files."""
