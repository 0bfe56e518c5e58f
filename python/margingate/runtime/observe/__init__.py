"""What is reported: metrics, events, audits, the fingerprint, integrity."""
