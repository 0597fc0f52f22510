"""Parts of the command line: shared options, exit codes, and the commands of a group."""
