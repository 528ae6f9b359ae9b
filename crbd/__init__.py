"""crbd: a TPM 2.0 backend daemon that speaks swtpm's protocols."""

__version__ = "0.1.0"
