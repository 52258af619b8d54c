"""What can be measured on texts and their log-probabilities."""
