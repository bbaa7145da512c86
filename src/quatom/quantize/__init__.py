"""A Hugging Face model in, a Quatom checkpoint out, one decoder block in memory at a time."""
