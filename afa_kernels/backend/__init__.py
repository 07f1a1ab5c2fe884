"""The implementations of the operator, one module each, what each of them is, and which one takes a call."""
