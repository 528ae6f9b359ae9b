"""crbd's own command line."""
