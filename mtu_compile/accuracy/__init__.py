"""What is measured and judged, on boards too: numpy alone."""
