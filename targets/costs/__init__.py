"""What layers cost, for the search for layers that stay float, and what a graph needs of memory."""
