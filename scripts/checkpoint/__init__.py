"""Parts of scripts/train_checkpoint.py: structures, training, evaluation, dynamics, publication."""
