"""swtpm's control protocol: one table, frozen messages, a sans-IO connection."""
