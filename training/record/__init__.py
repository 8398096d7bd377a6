"""What a run leaves to read: metrics, evaluations, trackers."""
