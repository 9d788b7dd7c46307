"""Tuners (PEFT methods), one file per family."""
