"""One op, one file: kernels, launchers, torch path, autograd, public function."""
