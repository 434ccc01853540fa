"""The loop and what surrounds it: setting up, the update, evaluation, checkpoints, the run folder."""
