"""MCMC rounds in flight: leases, dispatch to workers, timeouts."""
