"""What it costs, and beside what."""
