"""Asks: one rank's side of the conversation with the coordinator."""
