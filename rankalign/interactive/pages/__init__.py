"""Pages in the browser, each served on loopback alone."""
