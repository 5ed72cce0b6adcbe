"""The saved tree: its paths, keys and plain values."""
