"""One notion of how long a call lasts a file: a module-level CLOCK."""
