"""One TPM instance: engine, store and lifecycle."""
