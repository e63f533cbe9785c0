"""ENGINE: how independent pieces of work are run, one way a file."""
