"""Checked readers and writers of byte structures."""
