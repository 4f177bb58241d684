"""What driver and workers agree on: the plan of a run, leases and receipts."""
