"""Every loss against its definition in 50-digit arithmetic and, where there is one, against another implementation."""
