"""What methods for generators claim to do, measured: each module is a command."""
