"""`ibft-fast sweep`: a grid of fine-tunings, a cell of it chosen on other tasks than it is reported on."""
