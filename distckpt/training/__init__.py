"""What needs a training loop: hooks, sessions, agreements, quantization."""
