"""Reading model folders and GGUF files; the schema and atomic writing of checkpoints."""
