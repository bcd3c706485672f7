"""Engine adapters, one package per inference engine."""
