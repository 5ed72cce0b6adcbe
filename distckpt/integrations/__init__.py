"""Adapters to the trainers that people use, one module for each library: import the one that is needed."""
