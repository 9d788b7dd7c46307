"""A tuner, a pretext task and a family of backbones for medtpp."""
