"""Looking at a user's rows before training: what is wrong with them, what is in them. Nothing here prints."""
