"""The gate as plain Python over plain values: policy, ledger, queue. No torch, no SGLang."""
