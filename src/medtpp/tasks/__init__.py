"""Downstream tasks: heads and losses, one file each."""
