"""Which part goes on which node, with which share of its GPUs."""
