"""Many processes: who is who, agreement, stops, hangs."""
