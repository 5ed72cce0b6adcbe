"""The coordinator of a run: it commits a checkpoint once all ranks have landed their shards. Not a thread group.

messages is what ranks say and hear; machine decides, shell acts, client asks, and ray is where it is an actor.
"""
