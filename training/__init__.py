"""Training recipes: synthetic videos with known answers, and the script that makes `checkpoints/keye-tiny`."""
