"""TPM 2.0 command and response heads, command names and response codes."""
