"""DIALECT: how a tool names the tensors of an adapter, one tool a file."""
