"""The trained model: loading, adapters, packed attention, chunked log-probabilities, optimizer."""
