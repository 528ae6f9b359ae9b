"""ACPI tables that tell a guest of the registers that are served as a PCI device, and the AML they are written in."""
