"""The maths of a step as pure functions: advantages, losses, sampler correction, packing, log-probabilities."""
