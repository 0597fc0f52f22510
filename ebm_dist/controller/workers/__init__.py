"""Who is in the worker pool, what each has to do, and how many there should be."""
