"""One file per method. Importing `prune.registry` functions loads them all; nothing is listed here by hand."""
