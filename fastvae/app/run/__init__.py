"""Runs: settings, folder, training, evaluation and comparison, without a word on the terminal."""
