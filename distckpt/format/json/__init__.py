"""Typed JSON objects with a checksum of their own."""
