"""What a person starts: the command line and its commands. Nothing imports this folder."""
