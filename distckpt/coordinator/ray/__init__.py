"""Is Ray: the only place where the coordinator knows of it."""
