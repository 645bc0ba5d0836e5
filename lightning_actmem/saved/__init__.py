"""What autograd saves: identified, shared, packed and accounted for. Knows nothing of Lightning."""
