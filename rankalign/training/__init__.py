"""One file a stage of training."""
