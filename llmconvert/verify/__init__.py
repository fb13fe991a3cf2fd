"""Proofs: the ledger, the round trip, the logits. Nothing here knows specs or conversions."""
