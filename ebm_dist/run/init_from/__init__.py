"""`run.init_from`: a new run that begins with the weights, and the chains, of another."""
