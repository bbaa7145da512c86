"""The decoder network: one definition for every precision."""
