"""What kind of change MERGED is of BASE, with no adapter at hand; `line.py` reads aloud."""
