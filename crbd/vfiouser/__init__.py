"""The vfio-user protocol, sans-IO: a PCI device that is served to a VMM over a socket. docs/vfio-user.md."""
