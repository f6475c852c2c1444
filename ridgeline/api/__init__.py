"""What a user calls: the LLM class and the command line."""
