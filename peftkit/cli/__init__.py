"""`peftkit` on the command line: what is done to files, without a model."""
