"""The TPM itself behind one port: libtpms, and a scripted fake for tests."""
