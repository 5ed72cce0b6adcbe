"""A page that shows a run: made from its directory alone, in one file, to be looked at without a network."""
