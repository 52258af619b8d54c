"""What came out: statistics, comparisons, perplexity, reward, reports."""
