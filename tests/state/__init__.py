"""What goes into a checkpoint comes out of it."""
