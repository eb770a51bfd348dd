"""What a run needs of the machine: devices, their memory, parameters on them, and compiled programs."""
