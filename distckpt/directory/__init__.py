"""What a run's folder says: all that readers need."""
