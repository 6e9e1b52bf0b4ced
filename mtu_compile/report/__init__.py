"""The report of a bundle: one page that shows what was measured, on what, and what was not."""
