"""What each command does once its options are parsed. `cli.py` imports a command's module when the command is given."""
