"""FoT training, and the data and tasks that experiments share."""
