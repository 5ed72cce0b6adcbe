"""Decides: a pure state machine, events in and actions out."""
