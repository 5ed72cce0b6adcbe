"""Files of other programs: read as they are, written as checkpoints, and made of checkpoints."""
