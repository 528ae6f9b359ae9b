"""Making a TPM ready for its guest: keys, certificates, NV indices and PCR banks; and the authority that certifies."""
