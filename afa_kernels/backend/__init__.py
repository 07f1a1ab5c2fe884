"""The implementations of the operator, one module each, and the registry that chooses between
them."""
