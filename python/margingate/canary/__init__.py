"""`python -m margingate.canary VERSION`: whether an SGLang release that is not installed would do.

For developers of margingate: it fetches the release's wheel, compares it with what the gate patches
and touches, and runs the tests that start no server beside it. Nothing is installed.
"""
