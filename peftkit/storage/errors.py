"""The one error of reading and writing."""


class StorageError(ValueError):
    """A stored adapter that cannot be taken as it is; says which file and tensor, and what to do."""
