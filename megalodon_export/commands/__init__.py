"""The commands, once their options are parsed. `cli.py` imports a command's module when the command is given."""
