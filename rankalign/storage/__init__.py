"""Files that are never half-written, JSON Lines read strictly, journals and manifests."""
