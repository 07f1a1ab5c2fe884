"""The Triton backend. Importing this package does not import Triton: only backend.py's first call
does."""
