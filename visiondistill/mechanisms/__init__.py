"""What methods claim to do, measured: each module is a command."""
