"""Arrow files: shards and the index."""
