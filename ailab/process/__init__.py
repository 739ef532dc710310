"""What a run does with its process: signals, and the console with its log file."""
