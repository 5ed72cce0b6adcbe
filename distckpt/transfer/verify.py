"""Reading every byte of a checkpoint again, and telling all that is not as it was written."""
