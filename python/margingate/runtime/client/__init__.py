"""What clients may send, and what they get beside the answer (launcher and detokenizer)."""
