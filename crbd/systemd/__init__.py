"""What systemd offers a service, without its library."""
