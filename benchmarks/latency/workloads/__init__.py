"""What is run: one kind of subject a file, with a module-level WORKLOAD."""
