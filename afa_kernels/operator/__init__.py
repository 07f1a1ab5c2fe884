"""The operator: the public functions, their checks, what is differentiated and how, torch's operators."""
