"""From files or hub ids to device batches: sources -> encode -> order -> collate, each usable without the next."""
