"""Acts: performs the machine's actions on a store."""
