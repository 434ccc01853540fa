"""What a run shows and keeps for people: metrics, rollouts, progress, trackers, summary."""
