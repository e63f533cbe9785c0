"""What the package is measured by. Nothing here is part of the package."""
