"""Stores at the other end of a network. Nothing here is imported before a URL asks for it."""
