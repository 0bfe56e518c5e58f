"""From logits to a token, its margin and its log-probs; seeds, penalties, grammars."""
