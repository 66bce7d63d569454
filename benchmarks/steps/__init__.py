"""Whole training steps: trainers, the baseline, sweeps, the ladder."""
