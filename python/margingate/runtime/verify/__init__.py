"""Forwards that no client asked for, and what follows: verdicts, rollback, retraction."""
