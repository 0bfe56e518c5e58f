"""Which process this is: its machine, the ranks beside it and the replicas of its server."""
