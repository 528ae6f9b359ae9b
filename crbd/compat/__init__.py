"""swtpm's command lines, for hosts that put crbd in swtpm's place: each module is one command of the same name."""
