"""Decides: a pure state machine, events in and actions out. No clock, no randomness, no input or output.

Begin with ``machine``: what comes in, which part it goes to, and what an entry of the log leads to.

What goes in and out
    actions      events that it hears, and actions that it asks the shell for
    intentions   what waits to be logged, and which state comes of it
    desk         what the parts share: the time, tickets that wait for an answer, actions of this step, unique ids

The log
    ledger       claims an epoch and appends one entry at a time
    records      how records are found in a checkpoint state, and how a new one takes its place
    retention    which checkpoints stay
    keeping      retention at work: who needs what is read, the log says what retires, then objects are deleted
    following    what groups of readers want, and whether one lags

What ranks do
    runs         incarnations of the job, of which the newest owns the directory
    saves        saves in flight, from the first join to the commit
    rounds       one save of all ranks and its phases
    roundbook    where rounds are found
    plans        plans and descriptions that outlive one save
    restores     restores of all ranks together
    backpressure saves that wait until a group of readers has caught up
    stops        stops of all ranks together
    ending       the end of training
"""
