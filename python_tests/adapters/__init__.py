"""What every layer with adapters promises, tested on every kind of layer: subjects and their contract."""
