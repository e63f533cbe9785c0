"""Live producers to compare with; the only folder that imports peft."""
