"""MCMC rounds under way on the workers."""
