"""Data layouts, one file each."""
