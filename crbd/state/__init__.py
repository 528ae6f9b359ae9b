"""The saved forms of a TPM, as bytes."""
