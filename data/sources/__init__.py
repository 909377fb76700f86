"""Sources: one file per dataset family, in its native published format."""
