"""Data sets of the literature, one file each: from the official download to a manifest with the split of the protocol.

A class registered in `medtpp.config.RECIPES` knows one download; `medtpp.data.recipes.preparation.prepare` checks it
against the known counts, draws the split and writes manifest and card. Images stay where they are.
"""
