"""What a user asks for, from arguments to rows of an archive: generate, score again, check, convert."""
