"""Devices: parameters, precision, memory and compiled programs."""
