"""Looking on: what the TPM is asked and answers, written down for people and their tools."""
