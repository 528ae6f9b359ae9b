"""The ways in which a guest finds the registers: trapped, as memory, or a bit of both. One device behind all."""
