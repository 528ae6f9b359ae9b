"""Where frozen bytes live: directories, memory, and their locks."""
