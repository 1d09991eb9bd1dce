"""What is done to a base's files and to stored adapters without building a model."""
