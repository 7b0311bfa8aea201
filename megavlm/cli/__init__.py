"""The command line: `main.py` is the frame, and each command is one file."""
