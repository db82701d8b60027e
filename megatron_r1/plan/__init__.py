"""What a stage takes before it is started: memory of every rank and node, time, and which settings change them."""
