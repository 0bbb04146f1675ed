"""Published Keye checkpoints to ours and back, with proofs: `python -m conversion.convert SRC DST`."""
