"""Who holds which chunk, and who writes it."""
