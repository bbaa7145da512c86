"""Model families: what each one computes, read from its config.json."""
