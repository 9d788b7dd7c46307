"""Target Parameter Pre-training for parameter-efficient fine-tuning on medical images."""
