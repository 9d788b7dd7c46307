"""Training: one loop for every stage, and what differs between stages."""
