"""Runs: stages as cached steps over folders."""
