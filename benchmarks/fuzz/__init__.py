"""Fuzzing of everything that reads files which somebody else may have written."""
