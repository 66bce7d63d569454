"""From a model to a score: generate completions, judge them by running their tests, estimate pass@k."""
