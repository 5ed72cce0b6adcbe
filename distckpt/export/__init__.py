"""Exports of checkpoints: what is deployed, made from what was committed."""
