"""The machine: CUDA or CPU, and which packages it has. Only this room asks which of the two it is."""
