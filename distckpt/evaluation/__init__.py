"""Following a run from outside: who evaluates which checkpoint, under which lease, and what comes of it."""
