"""Threads that stop together: TensorFlow's Coordinator and LooperThread."""
