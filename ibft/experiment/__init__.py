"""Many runs as one experiment: jobs that go on where they stopped, and what is asked of every trained model."""
