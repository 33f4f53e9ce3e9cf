"""What a fine-tuning left on disk, as deltas of the base's weights: adapters, checkpoints, merged deltas."""
