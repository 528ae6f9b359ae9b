"""The trio shell: listeners, connections, supervision, shutdown."""
