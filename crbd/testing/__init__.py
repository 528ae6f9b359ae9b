"""Ephemeral TPMs for tests and CI jobs: each a process of its own with sockets in a private directory.

`crbd run` and the pytest plugin (crbd.testing.plugin) are made of it; `crbd.testing.tpm` is for other test frameworks.
"""
