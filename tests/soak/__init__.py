"""Attacks on whole processes and directories, for as long as one says: ``python -m tests.soak SECONDS``."""
