"""The report of a run: one page that anyone can open."""
