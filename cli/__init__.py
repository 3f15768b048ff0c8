"""What all programs share: flags, reading texts, loading models, progress, and how they end."""
