"""The TPM's registers (Command Response Buffer): the table, the machine and the ways to map it. Sans-IO."""
