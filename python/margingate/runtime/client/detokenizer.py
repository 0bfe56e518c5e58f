"""The detokenizer's process: text that was sent is not sent again.

SGLang sends the printable part of text that ends within a character, and notes how far it got. The
next tokens may make less of it printable (`find_printable_text` goes back to the last space); the
note then goes back too, and the part in between is sent twice. Several tokens at once do that.
"""

from __future__ import annotations

from typing import Any


def decode(original: Any, manager: Any, recv_obj: Any) -> list[str]:
    """AROUND DetokenizerManager._decode_batch_token_id_output: what was sent stays sent."""
    statuses = manager.decode_status
    sent = [(statuses[rid], statuses[rid].sent_offset) for rid in recv_obj.rids if rid in statuses]
    texts: list[str] = original(manager, recv_obj)
    for status, offset in sent:
        status.sent_offset = max(status.sent_offset, offset)
    return texts
