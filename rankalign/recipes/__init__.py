"""Several stages in a row, as one resumable command."""
