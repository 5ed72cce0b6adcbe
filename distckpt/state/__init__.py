"""Live objects to rows and back."""
