"""What generates: the `Engine` protocol, vLLM in the training process, and transformers where vLLM is not to be had."""
