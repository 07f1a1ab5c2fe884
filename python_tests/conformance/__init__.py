"""What every backend promises, tested on every backend: problems, targets and properties."""
